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

from qig_serve.offline.report.pictures import TokenPicture
from qig_serve.offline.report.token_map import heat_map

_LONGEST = 448  # pixels of the longer side of a picture in a report
_WIDTH = 54  # characters of a line of words


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
    import matplotlib

    fitted = _fit(picture.images[image])
    size, grey = fitted.size, np.asarray(fitted.convert("L"), np.float32) / 255
    heat = heat_map(picture.weights[layer], picture.boxes, image, size)
    top = float(np.percentile(heat, 99)) or float(heat.max()) or 1.0
    colours = matplotlib.colormaps["cividis"](np.clip(heat / top, 0, 1))[..., :3]
    mixed = 0.6 * colours + 0.4 * grey[..., None]
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


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
        "word is shaded, the more. Template tokens, in small print, take no part; the answer is "
        'underlined.</p><div class="layers"><figure><div class="images">',
    ]
    for number, image in enumerate(picture.images):
        parts.append(_img(_fit(image), f"{picture.name}: image {number + 1} as it was given"))
    parts.append("</div><figcaption>as it was given</figcaption></figure>")
    for layer in picture.weights:
        parts.append('<figure><div class="images">')
        for number in range(len(picture.images)):
            alternative = f"{picture.name}, {layer}: token weights over image {number + 1}, "
            shown = overlay(picture, layer, number)
            parts.append(_img(shown, alternative + _place(picture, layer, number)))
        parts.append(
            f"</div><figcaption>{html.escape(layer)}: {picture.image_share(layer):.0%} of the "
            "weight on the image, the rest on the words</figcaption>"
            f'<p class="words">{_words_html(picture, layer)}</p></figure>'
        )
    parts.append("</div>")
    return "\n".join(parts)


def _img(image: Image.Image, alternative: str) -> str:
    return (
        f'<img src="{png_url(image)}" alt="{html.escape(alternative)}" '
        f'width="{image.width}" height="{image.height}">'
    )


def _words_html(picture: TokenPicture, layer: str) -> str:
    words = picture.words(layer)
    most = max((weight for _, weight, _, _ in words), default=0.0) or 1.0
    out = []
    for text, weight, counts, answer in words:
        shown = html.escape(text).replace("\n", "&crarr;<wbr>")
        if not counts:
            out.append(f"<small>{shown}</small>")
            continue
        inner = f"<u>{shown}</u>" if answer else shown
        style = f"background: rgba(var(--mark), {0.75 * weight / most:.2f})"
        out.append(f'<span style="{style}" title="weight {weight:.2%}">{inner}</span>')
    return "".join(out)


PICTURE_STYLE = """
.layers { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(210px, 100%), 1fr)); }
.layers figure { margin: 0; }
.images { display: flex; flex-wrap: wrap; gap: 8px; }
.images img { max-width: 100%; height: auto; }
.words { line-height: 1.9; } .words span { padding: 2px 0; } .words small { opacity: 0.65; }
"""


def picture_png(picture: TokenPicture, path: Path) -> None:
    """The same as one PNG: one row per layer, with the image, its weights, and the words."""
    from matplotlib.figure import Figure

    layers, columns = list(picture.weights), 2 * len(picture.images) + 1
    fig = Figure(figsize=(4 * columns, 4 * len(layers)), layout="constrained")
    grid = fig.subplots(len(layers), columns, squeeze=False)
    for row, layer in zip(grid, layers, strict=True):
        for number, image in enumerate(picture.images):
            row[2 * number].imshow(np.asarray(image.convert("RGB")))
            row[2 * number + 1].imshow(np.asarray(overlay(picture, layer, number)))
            row[2 * number + 1].set_title(
                f"{layer}: {picture.image_share(layer):.0%} on the image", fontsize=9
            )
        for axes in row:
            axes.set_axis_off()
        _draw_words(row[-1], picture.words(layer))
    fig.savefig(path, dpi=110)


def _draw_words(axes: Any, words: Sequence[tuple[str, float, bool, bool]]) -> None:
    """Words in a monospaced face, shaded."""
    axes.set_xlim(0, _WIDTH)
    axes.set_ylim(-24, 1)
    most = max((weight for _, weight, counts, _ in words if counts), default=0.0) or 1.0
    column, line = 0, 0
    for text, weight, counts, answer in words:
        shown = text.replace("\n", " ").strip()
        if not shown:
            continue
        if column and column + len(shown) > _WIDTH:
            column, line = 0, line - 1
        back = (0, 0.447, 0.698, 0.75 * weight / most if counts else 0.0)
        axes.text(
            column,
            line,
            shown,
            family="monospace",
            fontsize=8,
            style="italic" if answer else "normal",
            alpha=1.0 if counts else 0.5,
            bbox={"facecolor": back, "edgecolor": "none", "pad": 1.5},
        )
        column += len(shown) + 1
