"""Which pixels an image token stands for.

A box is (left, top, right, bottom) in fractions of the picture as the user gave it: what the
processor cropped away, padded or cut into tiles is undone. Boxes of different tiles overlap where
a model sees the picture both whole and in parts. Tokens that stand for no pixels (the newline
tokens of LLaVA-NeXT and OneVision) have None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from qig_serve.architectures import get_architecture
from qig_serve.errors import UserError
from qig_serve.offline.source.loaded_model import image_token_id

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Given:
    """A picture of a sample."""

    image: Image.Image
    alone: bool
    """Whether it is the sample's only one."""
    grid: Any = None
    """Its row of the processor's image_grid_thw (time, rows, columns of patches), if there is."""
    size: Any = None
    """Its row of the processor's image_sizes (height, width), if there is."""
    places: Any = None
    """Its row of the processor's image_position_ids (x, y of every patch or -1), if there is."""


def grid_boxes(rows: int, columns: int, area: Box = (0.0, 0.0, 1.0, 1.0)) -> list[Box]:
    """Row-major boxes of a rows x columns grid over `area`."""
    left, top, right, bottom = area
    width, height = (right - left) / columns, (bottom - top) / rows
    return [
        (left + c * width, top + r * height, left + (c + 1) * width, top + (r + 1) * height)
        for r in range(rows)
        for c in range(columns)
    ]


def _square(tokens: int) -> int:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(f"{tokens} image tokens do not form a square: the picture cannot be mapped")
    return side


def _grid(config: Any, processor: Any, given: Given) -> list[Box | None]:
    """One grid over the resized and perhaps centre-cropped picture, or its own patches."""
    if given.size is not None:  # of a Pixtral tower
        return _sized(config, processor, given)
    images = processor.image_processor
    size, crop = images.size, images.crop_size
    width, height = given.image.size
    if getattr(size, "shortest_edge", None):
        scale = size.shortest_edge / min(width, height)
        resized = (round(width * scale), round(height * scale))
    else:
        resized = (size.width, size.height)
    seen = (crop.width, crop.height) if images.do_center_crop else resized
    patch = config.vision_config.patch_size
    # The crop is central, and may reach over the edge of a narrow picture.
    dx, dy = (resized[0] - seen[0]) / 2 / resized[0], (resized[1] - seen[1]) / 2 / resized[1]
    return [*grid_boxes(seen[1] // patch, seen[0] // patch, (dx, dy, 1 - dx, 1 - dy))]


def _anyres(config: Any, processor: Any, given: Given) -> list[Box | None]:
    """The whole picture, then a grid over its tiles without padding, a newline token for each row.

    Mirrors pack_image_features of LlavaNextModel and LlavaOnevisionModel; the latter shrinks large
    grids, and does not tile several pictures in one prompt.
    """
    from transformers.image_processing_utils import select_best_resolution

    side = config.vision_config.image_size // config.vision_config.patch_size
    base: list[Box | None] = [*grid_boxes(side, side)]
    shrinks = getattr(config, "vision_aspect_ratio", "")
    if shrinks and not given.alone:
        return [*base, None]
    width, height = given.image.size
    canvas = select_best_resolution((height, width), [list(p) for p in config.image_grid_pinpoints])
    rows = canvas[0] // config.vision_config.image_size * side
    columns = canvas[1] // config.vision_config.image_size * side
    unpadded = [rows, columns]
    if width / height > columns / rows:
        unpadded[0] -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
    else:
        unpadded[1] -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
    # Where the picture lies on the canvas, in pixels: scaled to fit, in the middle.
    scale = min(canvas[1] / width, canvas[0] / height)
    fit = (math.ceil(width * scale), math.ceil(height * scale))
    cell = config.vision_config.image_size / side
    half = (unpadded[1] * cell / 2, unpadded[0] * cell / 2)
    dx, dy = half[0] / fit[0] - 0.5, half[1] / fit[1] - 0.5  # kept padding, in fractions
    most = int(str(shrinks).removeprefix("anyres_max_")) if shrinks else math.inf
    ratio = math.sqrt(unpadded[0] * unpadded[1] / (most * side**2))
    if ratio > 1.1:
        unpadded = [int(unpadded[0] // ratio), int(unpadded[1] // ratio)]
    boxes = grid_boxes(unpadded[0], unpadded[1], (-dx, -dy, 1 + dx, 1 + dy))
    lines = [boxes[r * unpadded[1] : (r + 1) * unpadded[1]] for r in range(unpadded[0])]
    return base + [box for line in lines for box in (*line, None)]


def _merged(config: Any, processor: Any, given: Given) -> list[Box | None]:
    """Patches in merged squares, row by row, over the resized picture (image_grid_thw)."""
    merge = processor.image_processor.merge_size
    _, rows, columns = (int(v) for v in given.grid)
    return [*grid_boxes(rows // merge, columns // merge)]


def _sized(config: Any, processor: Any, given: Given) -> list[Box | None]:
    """Merged patches, row by row, over the picture resized to whole ones (image_sizes)."""
    side = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    height, width = (int(v) for v in given.size)
    return [*grid_boxes(height // side, width // side)]


def _placed(config: Any, processor: Any, given: Given) -> list[Box | None]:
    """Pooled patches, row by row, over the resized picture (image_position_ids)."""
    pooled = config.vision_config.pooling_kernel_size
    columns, rows = (int(v) + 1 for v in np.asarray(given.places).max(0))
    return [*grid_boxes(rows // pooled, columns // pooled)]


def _pieces(config: Any, processor: Any, given: Given) -> list[Box | None]:
    """Pieces of the resized picture, row by row (image_position_ids)."""
    columns, rows = (int(v) + 1 for v in np.asarray(given.places).max(0))
    return [*grid_boxes(rows, columns)]


def _tiles(config: Any, processor: Any, given: Given) -> list[Box | None]:
    """Tiles row by row over the stretched picture, then the whole picture if there are several."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    images = processor.image_processor
    side = _square(processor.image_seq_length)
    if not images.crop_to_patches:
        return [*grid_boxes(side, side)]
    columns, rows = get_optimal_tiled_canvas(
        (given.image.height, given.image.width),
        (images.size.height, images.size.width),
        images.min_patches,
        images.max_patches,
    )
    boxes: list[Box | None] = [
        box for tile in grid_boxes(rows, columns) for box in grid_boxes(side, side, tile)
    ]
    if rows * columns > 1:
        boxes += grid_boxes(side, side)
    return boxes


def _split(config: Any, processor: Any, given: Given) -> list[Box | None]:
    """Tiles row by row, then the whole picture; the whole picture alone if it was small."""
    images = processor.image_processor
    split = images([[given.image]], return_row_col_info=True, return_tensors="np")
    rows, columns = int(split["rows"][0][0]), int(split["cols"][0][0])
    side = _square(processor.image_seq_len)
    tiles = grid_boxes(rows, columns) if rows and columns else []
    return [box for tile in [*tiles, (0.0, 0.0, 1.0, 1.0)] for box in grid_boxes(side, side, tile)]


def _cut(config: Any, processor: Any, given: Given) -> list[Box | None]:
    """Square tiles row by row, then the whole picture; the whole picture alone if it was small."""
    images = processor.image_processor
    cut = images([[given.image]], return_row_col_info=True, return_tensors="pt")
    rows, columns = int(cut["image_rows"][0]), int(cut["image_cols"][0])
    cell = images.encoder_patch_size * images.downsample_factor
    height, width = (math.ceil(int(v) / cell) for v in cut["image_sizes"][0])
    side, boxes = math.ceil(images.tile_size / cell), []
    if rows * columns > 1:
        boxes = [b for tile in grid_boxes(rows, columns) for b in grid_boxes(side, side, tile)]
    if rows * columns == 1 or images.use_thumbnail:
        boxes += grid_boxes(height, width)
    return [*boxes]


def _sliced(config: Any, processor: Any, given: Given) -> list[Box | None]:
    """The whole picture, then equal slices of it row by row, if it was large; each of its size."""
    images = processor.image_processor
    cut = images([[given.image]], return_tensors="pt")
    cell = 2 if images.downsample_mode == "4x" else 4  # patches on a side of a token
    (rows, columns), sizes = cut["grids"][0], cut["target_sizes"].tolist()
    pieces = [(0.0, 0.0, 1.0, 1.0), *(grid_boxes(rows, columns) if rows and columns else [])]
    return [
        box
        for (height, width), piece in zip(sizes, pieces, strict=True)
        for box in grid_boxes(height // cell, width // cell, piece)
    ]


def _pooled(config: Any, processor: Any, given: Given) -> list[Box | None]:
    """One pooled grid over the whole stretched picture."""
    if processor.image_processor.do_pan_and_scan:
        raise UserError("pictures cannot be mapped with Gemma 3's pan and scan: switch it off")
    side = _square(config.mm_tokens_per_image)
    return [*grid_boxes(side, side)]


LAYOUTS: dict[str, Callable[[Any, Any, Given], list[Box | None]]] = {
    "grid": _grid,
    "anyres": _anyres,
    "cut": _cut,
    "merged": _merged,
    "placed": _placed,
    "pieces": _pieces,
    "sized": _sized,
    "sliced": _sliced,
    "tiles": _tiles,
    "split": _split,
    "pooled": _pooled,
}
"""Architecture.pictures -> the boxes of a picture's tokens: (config, processor, picture)."""


def token_boxes(
    config: Any, processor: Any, inputs: dict[str, Any], images: Sequence[Image.Image]
) -> dict[int, tuple[int, Box | None]]:
    """Position in the sequence -> (which picture, its box), for the image tokens of one sample.

    `inputs` is what the processor made of the sample, a batch of one; `images` are its pictures.
    UserError for an unknown family, or when the boxes do not come out as many as the tokens.
    """
    layout = LAYOUTS[get_architecture(config.model_type).pictures]
    ids = torch.as_tensor(inputs["input_ids"]).reshape(-1)
    positions = (ids == image_token_id(config, processor)).nonzero()[:, 0].tolist()
    rows = ("image_grid_thw", "image_sizes", "image_position_ids")
    known = [None if (row := inputs.get(name)) is None else np.asarray(row) for name in rows]
    boxes: list[tuple[int, Box | None]] = []
    for number, image in enumerate(images):
        mine = (None if row is None else row[number] for row in known)
        given = Given(image, len(images) == 1, *mine)
        boxes += [(number, box) for box in layout(config, processor, given)]
    if len(boxes) != len(positions):
        raise UserError(
            f"the picture has {len(positions)} tokens, but {len(boxes)} places were expected: this "
            f"{config.model_type} processor differs from the one of the transformers that is known"
        )
    return dict(zip(positions, boxes, strict=True))


def heat_map(
    weights: torch.Tensor,
    boxes: Mapping[int, tuple[int, Box | None]],
    image: int,
    size: tuple[int, int],
) -> np.ndarray:
    """Token weights [T] spread over the pixels they stand for: [height, width], fp32.

    Every token's weight is spread evenly over its box, so that tiles of different sizes compare;
    where boxes overlap their densities add up. The mean over the picture is the sum of weights.
    """
    width, height = size
    heat = np.zeros((height, width), np.float32)
    for position, (number, box) in boxes.items():
        if number != image or box is None:
            continue
        area = (box[2] - box[0]) * (box[3] - box[1])
        left, right = (min(width, max(0, round(x * width))) for x in (box[0], box[2]))
        top, bottom = (min(height, max(0, round(y * height))) for y in (box[1], box[3]))
        heat[top:bottom, left:right] += float(weights[position]) / area
    return heat
