"""How report.html looks: contrast and colour-blindness of the palette, and headless Chromium."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.reports import EVALUATION, make_picture, make_report
from PIL import Image

from qig_serve.offline.report import plots
from qig_serve.offline.report.page import render_html, with_evaluation

# What people without one kind of cone see, in linear RGB (Machado, Oliveira and Fernandes 2009,
# severity 1).
SIGHT = {
    "usual": np.eye(3),
    "no red cones": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "no green cones": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "no blue cones": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
LIGHT, DARK = plots.STYLE.split("@media")


def _colours(style: str) -> dict[str, np.ndarray]:
    """Name -> linear RGB of every colour that a style sheet gives a name."""
    found = {}
    for name, code in re.findall(r"--(\w+): #(\w{6})", style):
        srgb = np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        found[name] = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return found


def _lab(linear: np.ndarray) -> np.ndarray:
    """CIE L*a*b* under D65, in which 2 is about the least difference that is seen."""
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = to_xyz @ np.clip(linear, 0, 1) / np.array([0.9505, 1, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def _contrast(a: np.ndarray, b: np.ndarray) -> float:
    """WCAG's contrast ratio."""
    low, high = sorted(float(c @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("style", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_and_colour_blind_readers(style: str) -> None:
    colours = _colours(style)
    lines = [colours[f"s{i}"] for i in range(4)]
    assert _contrast(colours["ink"], colours["page"]) > 12
    assert all(_contrast(line, colours["page"]) > 4.5 for line in lines)  # WCAG AA, for text
    for sight, matrix in SIGHT.items():
        for a, b in itertools.combinations(lines, 2):
            assert np.linalg.norm(_lab(matrix @ a) - _lab(matrix @ b)) > 10, sight


@pytest.mark.usefixtures("drawn_plots")
def test_eight_lines_differ_without_colour() -> None:
    _, axes = plots.figure()
    for number in range(8):
        plots.series(axes, number, [0, 1], [number, number], str(number))
    assert len({line.get_marker() for line in axes.get_lines()}) == 8
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}) == 8


@pytest.mark.slow
@pytest.mark.usefixtures("drawn_plots")
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize(("theme", "preferred"), [("light", 1), ("dark", 0)])
def test_chromium_draws_the_page(tmp_path: Path, theme: str, preferred: int) -> None:
    """Ink, paper and lines in the colours of the theme, and nothing asked of a network.

    Chromium logs every resource that it fails to load, and here it can reach none.
    """
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    page.write_text(with_evaluation(render_html(make_report(), [make_picture()]), EVALUATION))
    done = subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        + [f"--blink-settings=preferredColorScheme={preferred}", "--window-size=1000,5000"]
        + [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
        + ["--host-resolver-rules=MAP * ~NOTFOUND", f"--screenshot={shot}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    seen = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    style = LIGHT if theme == "light" else DARK
    for name, least in (("page", 1_000_000), ("ink", 2000), ("s0", 100), ("s1", 100)):
        code = re.search(rf"--{name}: #(\w{{6}})", style)[1]  # type: ignore[index]
        wanted = np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)])
        assert (np.abs(seen.astype(int) - wanted).max(-1) <= 2).sum() > least, (theme, name)
