"""The trained models in this package, with their channel outliers or without them.

The files hold the outliers. Taking them out moves exponents only, so both variants compute the
same function bit for bit (outliers.py) and differ in how hard they are to quantize.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from qig_serve.demo import MODEL_DIR
from qig_serve.demo.model import MODELS, get_spec, load_model, save_model
from qig_serve.demo.outliers import Outliers, add_outliers
from qig_serve.errors import UserError


def bundled_directory(name: str) -> Path:
    """Where the model `name` of demo/model.py's table lies; UserError when it has no such row."""
    if name not in MODELS:
        raise UserError(f"no demonstration model {name!r}: the models are {', '.join(MODELS)}")
    return MODEL_DIR if name == "llava" else MODEL_DIR.parent / "models" / name


def export_bundled(name: str, output: Path | str, outliers: bool = True) -> Path:
    """Writes a bundled model to the new directory `output`, without its outliers if not wanted."""
    source, output = bundled_directory(name), Path(output)
    if output.exists():
        raise UserError(f"{output} exists already; name a new directory")
    if outliers:
        return Path(shutil.copytree(source, output))
    model, processor = load_model(source)
    add_outliers(model, Outliers().undo(), keep=(get_spec(name).sink_channel,))
    save_model(model, processor, output)
    return output
