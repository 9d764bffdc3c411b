"""The trained models, with their channel outliers or without them.

One is bundled with the package; the others are for its tests, and lie beside them in the source
repository. The files hold the outliers. Taking them out moves exponents only, so both variants
compute the same function bit for bit (outliers.py) and differ in how hard they are to quantize.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from qig_serve.demo import MODEL_DIR
from qig_serve.demo.model import MODELS, get_spec, load_model, save_model
from qig_serve.demo.outliers import Outliers, add_outliers
from qig_serve.errors import UserError

BUNDLED = "llava"
"""The one that the package contains."""

TEST_MODELS = Path(__file__).resolve().parents[2] / "tests" / "models"
"""The others, where the package runs from a checkout of its repository."""


def bundled_directory(name: str) -> Path:
    """Where the model `name` of demo/model.py's table lies.

    UserError when the table has no such row, or the model is not on this machine.
    """
    if name not in MODELS:
        raise UserError(f"no demonstration model {name!r}: the models are {', '.join(MODELS)}")
    if not MODELS[name].trained:
        raise UserError(
            f"no trained {name!r} is in the repository: make one, qig-serve demo train --model "
            f"{name} --output DIR"
        )
    if name == BUNDLED:
        return MODEL_DIR
    directory = TEST_MODELS / name
    if not directory.is_dir():
        raise UserError(
            f"the demonstration model {name!r} is not part of the installed package: use "
            f"{BUNDLED!r}, or run the command from a checkout of qig-serve's repository"
        )
    return directory


def export_bundled(name: str, output: Path | str, outliers: bool = True) -> Path:
    """Writes a trained model to the new directory `output`, without its outliers if not wanted."""
    source, output = bundled_directory(name), Path(output)
    if output.exists():
        raise UserError(f"{output} exists already; name a new directory")
    try:
        if outliers:
            return Path(shutil.copytree(source, output))
        model, processor = load_model(source)
        add_outliers(model, Outliers().undo(), keep=(get_spec(name).sink_channel,))
        save_model(model, processor, output)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    return output
