"""Which room may import which, asserted in a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest


def _modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    return set(done.stdout.split())


def _loaded(modules: set[str], *names: str) -> list[str]:
    return sorted(m for m in modules if any(m == n or m.startswith(n + ".") for n in names))


@pytest.mark.parametrize(
    ("statement", "banned"),
    [
        ("import qig_serve.vllm_plugin", ("torch", "vllm", "transformers", "pydantic")),
        (
            "import qig_serve.kernels.ops",
            ("vllm", "transformers", "pydantic", "qig_serve.offline"),
        ),
        ("import qig_serve.kernels.reference", ("triton", "vllm", "transformers")),
        ("import qig_serve.offline.pipeline", ("vllm",)),
        ("import qig_serve.serve, qig_serve.batch", ("qig_serve.offline",)),
        ("import qig_serve.evaluate", ("qig_serve.offline",)),
    ],
    ids=["plugin", "kernels", "oracle", "quantizer", "server", "evaluation"],
)
def test_rooms_stay_apart(statement: str, banned: tuple[str, ...]) -> None:
    assert _loaded(_modules_after(statement), *banned) == []


def test_the_package_itself_gives_quantize_and_its_recipe() -> None:
    import qig_serve
    from qig_serve.offline.pipeline import quantize
    from qig_serve.offline.recipe import QuantRecipe

    assert (qig_serve.quantize, qig_serve.QuantRecipe) == (quantize, QuantRecipe)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = qig_serve.quantise


def test_help_needs_no_torch() -> None:
    modules = _modules_after(
        "from qig_serve.cli import main\n"
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main(['--help'])"
    )
    assert _loaded(modules, "torch", "vllm", "transformers") == []
