"""Draws a TokenPicture: as HTML for a report, as one PNG."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qig_serve.json_output import write_whole
from qig_serve.offline.report.pictures import TokenPicture
from qig_serve.offline.report.token_map import heat_map

_LONGEST = 448  # pixels of the longer side of a picture in a report
_WIDTH = 54  # characters of a line of words
_LINES = 24
_MARK = (0, 0.447, 0.698)  # colour of a word, and how much of it the largest weight has
_DARKEST = 0.75
_PER_AREA, _PER_WORD = "% of the weight per 1% of the picture's area", "% of the weight on a word"
_STOPS = 9  # colours of a scale in a page, between which a browser goes on its own


def _fit(image: Image.Image) -> Image.Image:
    """The image at the size of a report; small ones are blown up, their pixels kept sharp."""
    longest = max(image.size)
    scale = min(_LONGEST, max(longest, _LONGEST * 5 // 8)) / longest
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, resample)


def overlay(picture: TokenPicture, layer: str, image: int = 0) -> Image.Image:
    """The image in grey with the weight laid over it: dark blue is little, yellow is much.

    The scale is cividis, made for colour-blind readers, from 0 to the 99th percentile of the
    pixels; brightness alone shows the order.
    """
    fitted = _fit(picture.images[image])
    grey = np.asarray(fitted.convert("L"), np.float32) / 255
    heat, top = _heat(picture, layer, image)
    return Image.fromarray((_over(grey, heat / top) * 255).round().astype(np.uint8))


def _heat(picture: TokenPicture, layer: str, image: int) -> tuple[np.ndarray, float]:
    """Weight over area, each of its whole, of the pixels [H, W] of a fitted image; scale's end."""
    size = _fit(picture.images[image]).size
    heat = heat_map(picture.weights[layer], picture.boxes, image, size)
    return heat, float(np.percentile(heat, 99)) or float(heat.max()) or 1.0


def _over(grey: np.ndarray | float, heat: np.ndarray) -> Any:
    """Colours [..., 3], 0..1, of `heat` [...], 0..1, over a picture as bright as `grey`, 0..1."""
    import matplotlib

    colours = matplotlib.colormaps["cividis"](np.clip(heat, 0, 1))[..., :3]
    return 0.6 * colours + 0.4 * np.asarray(grey)[..., None]


def png_url(image: Image.Image) -> str:
    """The picture as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _place(picture: TokenPicture, layer: str, image: int) -> str:
    """Where the weight lies, in words: the ninth of the picture with the most."""
    heat = heat_map(picture.weights[layer], picture.boxes, image, (48, 48))
    ninths = heat.reshape(3, 16, 3, 16).mean((1, 3))
    if not ninths.any():
        return "no weight on it"
    row, column = np.unravel_index(ninths.argmax(), ninths.shape)
    rows, columns = ("upper", "middle", "lower"), ("left", "centre", "right")
    share = ninths.max() / ninths.sum()
    return f"most in the {rows[row]} {columns[column]} ninth ({share:.0%} of the picture's weight)"


def picture_html(picture: TokenPicture) -> str:
    """The sample as HTML: the images as given, and beside them each layer's weights on them and on
    the words."""
    parts = [
        f"<h3>{html.escape(picture.name)}</h3>",
        '<p class="note">On the image yellow is much weight and dark blue little; the stronger a '
        "word is shaded, the more: below both is the scale. Template tokens, in small print, take "
        'no part; the answer is underlined.</p><div class="layers"><figure><div class="images">',
    ]
    for number, image in enumerate(picture.images):
        parts.append(_img(_fit(image), f"{picture.name}: image {number + 1} as it was given"))
    parts.append("</div><figcaption>as it was given</figcaption></figure>")
    for layer in picture.weights:
        parts.append('<figure><div class="images">')
        for number in range(len(picture.images)):
            alternative = f"{picture.name}, {layer}: token weights over image {number + 1}, "
            shown = overlay(picture, layer, number)
            drawn = _img(shown, alternative + _place(picture, layer, number))
            heat, top = _heat(picture, layer, number)
            colours = _over(1.0, np.linspace(0, 1, _STOPS))
            stops = ["rgb({:.0f} {:.0f} {:.0f})".format(*colour) for colour in 255 * colours]
            scale = _scale_html(stops, top, _PER_AREA, bool(heat.max() > top))
            parts.append(f"<div>{drawn}{scale}</div>")
        words, most = _words_html(picture, layer)
        stops = ["rgba(var(--mark), 0)", f"rgba(var(--mark), {_DARKEST})"]
        parts.append(
            f"</div><figcaption>{html.escape(layer)}: {picture.image_share(layer):.0%} of the "
            "weight on the image, the rest on the words</figcaption>"
            f'<p class="words">{words}</p>{_scale_html(stops, 100 * most, _PER_WORD)}</figure>'
        )
    parts.append("</div>")
    return "\n".join(parts)


def _img(image: Image.Image, alternative: str) -> str:
    return (
        f'<img src="{png_url(image)}" alt="{html.escape(alternative)}" '
        f'width="{image.width}" height="{image.height}">'
    )


def _scale_html(stops: Sequence[str], top: float, label: str, more: bool = False) -> str:
    """The scale of colours in CSS, equally far apart, from 0 to `top`, and of more than that."""
    numbers = "0", f"{top / 2:.3g}", f"{top:.3g}" + (" or more" if more else "")
    return (
        f'<div class="scale"><i style="background: linear-gradient(to right, {", ".join(stops)})">'
        f"</i>{''.join(f'<span>{number}</span>' for number in numbers)}<b>{label}</b></div>"
    )


def _words_html(picture: TokenPicture, layer: str) -> tuple[str, float]:
    """The words, shaded up to the largest weight of one, and that weight."""
    words = picture.words(layer)
    most = max((weight for _, weight, _, _ in words), default=0.0) or 1.0
    out = []
    for text, weight, counts, answer in words:
        shown = html.escape(text).replace("\n", "&crarr;<wbr>")
        if not counts:
            out.append(f"<small>{shown}</small>")
            continue
        inner = f"<u>{shown}</u>" if answer else shown
        style = f"background: rgba(var(--mark), {_DARKEST * weight / most:.2f})"
        out.append(f'<span style="{style}" title="weight {weight:.2%}">{inner}</span>')
    return "".join(out), most


PICTURE_STYLE = """
.layers { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(210px, 100%), 1fr)); }
.layers figure { margin: 0; }
.images { display: flex; flex-wrap: wrap; gap: 8px; }
.images img { max-width: 100%; height: auto; }
.scale { display: grid; grid-template-columns: 1fr auto 1fr; font-size: 0.75rem; line-height: 1.4;
  margin: 4px 0 8px; max-width: 280px; }
.scale i { height: 10px; border: 1px solid var(--line); }
.scale i, .scale b { grid-column: 1 / -1; font-weight: normal; }
.scale span:last-of-type { text-align: right; }
.words { line-height: 1.9; } .words span { padding: 2px 0; } .words small { opacity: 0.65; }
"""


def picture_png(picture: TokenPicture, path: Path) -> None:
    """The same as one PNG: one row per layer, with the image, its weights, and the words.

    Below weights and words stand their colours' scales, in percent of the layer's weight.
    """
    from matplotlib.figure import Figure

    layers, columns = list(picture.weights), 2 * len(picture.images) + 1
    fig = Figure(figsize=(4 * columns, 4.6 * len(layers)), layout="constrained")
    heights = [1, 0.04] * len(layers)
    grid = fig.subplots(2 * len(layers), columns, squeeze=False, height_ratios=heights)
    for row, bars, layer in zip(grid[::2], grid[1::2], layers, strict=True):
        for number, image in enumerate(picture.images):
            row[2 * number].imshow(np.asarray(image.convert("RGB")))
            row[2 * number + 1].imshow(np.asarray(overlay(picture, layer, number)))
            row[2 * number + 1].set_title(
                f"{layer}: {picture.image_share(layer):.0%} on the image", fontsize=9
            )
            bars[2 * number].set_axis_off()
            heat, top = _heat(picture, layer, number)
            steps = np.linspace(0, 1, 256)
            _bar(bars[2 * number + 1], _over(1.0, steps), top, _PER_AREA, bool(heat.max() > top))
        for axes in row:
            axes.set_axis_off()
        most = _draw_words(row[-1], picture.words(layer))
        row[-1].set_title("italic: the answer; grey: the template, without weight", fontsize=9)
        steps = np.linspace(0, _DARKEST, 256)[:, None]
        shades = 1 - steps + steps * np.array(_MARK)
        _bar(bars[-1], shades, 100 * most, _PER_WORD)
    drawn = io.BytesIO()
    fig.savefig(drawn, dpi=110, format="png")
    write_whole(path, drawn.getvalue())


def _bar(axes: Any, colours: np.ndarray, top: float, label: str, more: bool = False) -> None:
    """Fills the axes with the scale of `colours` [n, 3] from 0 to `top`, and of more than that."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    scale = ScalarMappable(Normalize(0, top), ListedColormap(colours))
    extend = "max" if more else "neither"
    bar = axes.figure.colorbar(scale, cax=axes, orientation="horizontal", extend=extend)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _draw_words(axes: Any, words: Sequence[tuple[str, float, bool, bool]]) -> float:
    """Words in a monospaced face, shaded up to the largest weight of one, which is returned."""
    axes.set_xlim(0, _WIDTH)
    axes.set_ylim(-_LINES, 1)
    most = max((weight for _, weight, counts, _ in words if counts), default=0.0) or 1.0
    column, line = 0, 0
    for text, weight, counts, answer in words:
        shown = text.replace("\n", " ").strip()
        if not shown:
            continue
        if column and column + len(shown) > _WIDTH:
            column, line = 0, line - 1
        if line <= -_LINES:
            axes.text(0, line, "(and more words)", fontsize=8)
            break
        axes.text(
            column,
            line,
            shown,
            family="monospace",
            fontsize=8,
            style="italic" if answer else "normal",
            alpha=1.0 if counts else 0.5,
            bbox={
                "facecolor": (*_MARK, _DARKEST * weight / most if counts else 0.0),
                "edgecolor": "none",
                "pad": 1.5,
            },
            parse_math=False,
        )
        column += len(shown) + 1
    return most
