"""Checkpoint layout (formats.py) -> the layout that the kernels read, once, at load.

Pure torch, on CPU or CUDA, no triton. The layouts are private to the kernels and may change with
them; what is stored on disk does not. Both are drawn in the headers of w3a16.py and w4a8.py.
N is padded to a multiple of ROW_TILE with zero scales, so no kernel masks a weight load.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qig_serve.packing import unpack

ROW_TILE = 128
"""Output rows that a tile of either layout holds."""
GROUP = 128
"""Inputs along K that a tile holds: a scale group of w3a16, a block of w4a8."""
FIELDS = (0, 3, 6, 9, 12)
"""Lowest bits of the five whole 3-bit fields of a 16-bit lane; bit 15 is the left-over one."""

_ROWS_AT_ONCE = 32 * ROW_TILE  # bounds the int64 temporaries of unpacking


def padded_rows(n: int) -> int:
    """N rounded up to whole tiles."""
    return -(-n // ROW_TILE) * ROW_TILE


def _pad_rows(tensor: torch.Tensor) -> torch.Tensor:
    return F.pad(tensor, (0, 0, 0, padded_rows(tensor.shape[0]) - tensor.shape[0]))


def repack_w3a16(
    packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Tensors of formats.tensor_specs("w3a16") -> `weight_lanes` and `scale_zero`.

    packed int32 [N, K * 3 / 32], scale [N, K / 128], zero uint8 [N, K / 128]; `dtype` (16 bits) is
    that of the activations, in which the scale is kept. Returns weight_lanes int16
    [K / 128, N_pad / 128, 3, 64, 16] and scale_zero int32 [K / 128, N_pad], whose low half is the
    scale's bits and whose high half is the zero point.
    """
    n, words = packed.shape
    groups = words * 32 // 3 // GROUP
    tiles = padded_rows(n) // ROW_TILE
    lanes = torch.empty(groups, tiles, 3, 64, 16, dtype=torch.int16, device=packed.device)
    for start in range(0, n, _ROWS_AT_ONCE):
        codes = _pad_rows(unpack(packed[start : start + _ROWS_AT_ONCE], 3, signed=False))
        first = start // ROW_TILE
        lanes[:, first : first + codes.shape[0] // ROW_TILE] = _pack_lanes(codes)
    bits = scale.to(dtype).contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    scale_zero = _pad_rows(bits | (zero.to(torch.int32) << 16)).t().contiguous()
    return {"weight_lanes": lanes, "scale_zero": scale_zero}


def _pack_lanes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [128 * T, K] -> int16 [G, T, 3, 64, 16]."""
    planes = (
        codes.to(torch.int32)
        .reshape(-1, 2, 64, codes.shape[1] // GROUP, 8, 16)  # [T, half, row, G, slice, 16]
        .permute(1, 4, 3, 0, 2, 5)
        .reshape(16, codes.shape[1] // GROUP, -1, 64, 16)  # [plane, G, T, row, 16]
    )
    lanes = []
    for lane in range(3):
        word = ((planes[15] >> lane) & 1) << 15
        for i, low_bit in enumerate(FIELDS):
            word = word | (planes[5 * lane + i] << low_bit)
        lanes.append(word)
    stacked = torch.stack(lanes, dim=2)  # [G, T, 3, 64, 16]
    return torch.where(stacked >= 1 << 15, stacked - (1 << 16), stacked).to(torch.int16)


def unpack_w3a16(
    lanes: torch.Tensor, scale_zero: torch.Tensor, n: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inverse of `repack_w3a16`: codes uint8 [N, K], scale [N, G] of `dtype`, zero uint8 [N, G]."""
    groups, tiles = lanes.shape[:2]
    word = lanes.to(torch.int32) & 0xFFFF
    planes = [(word[:, :, i // 5] >> FIELDS[i % 5]) & 7 for i in range(15)]
    planes.append(sum((word[:, :, lane] >> 15) << lane for lane in range(3)))
    codes = (
        torch.stack(planes)
        .reshape(2, 8, groups, tiles, 64, 16)
        .permute(3, 0, 4, 2, 1, 5)
        .reshape(tiles * ROW_TILE, groups * GROUP)
    )
    bits = scale_zero.t()[:n] & 0xFFFF
    bits = torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16).contiguous()
    zero = (scale_zero.t()[:n] >> 16).to(torch.uint8)
    return codes[:n].to(torch.uint8), bits.view(dtype), zero


def repack_w4a8(packed: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of formats.tensor_specs("w4a8") -> `weight_nibbles` and `channel_scale`.

    packed int32 [N, K / 8], scale fp32 [N, 1]. Returns weight_nibbles int8
    [K / 128, N_pad, 64] and channel_scale fp32 [N_pad], divided by 16 because the kernel multiplies
    with 16 times the code.
    """
    n, words = packed.shape
    blocks = words * 8 // GROUP
    nibbles = torch.empty(blocks, padded_rows(n), 64, dtype=torch.int8, device=packed.device)
    for start in range(0, n, _ROWS_AT_ONCE):
        codes = _pad_rows(unpack(packed[start : start + _ROWS_AT_ONCE], 4, signed=True))
        halves = codes.to(torch.int32).reshape(-1, blocks, 2, 64)  # k 0..63 and 64..127
        byte = (halves[:, :, 0] & 15) | (halves[:, :, 1] << 4)  # within -128..127
        nibbles[:, start : start + codes.shape[0]] = byte.to(torch.int8).transpose(0, 1)
    channel_scale = _pad_rows(scale.float().reshape(n, 1) / 16).reshape(-1).contiguous()
    return {"weight_nibbles": nibbles, "channel_scale": channel_scale}


def unpack_w4a8(
    nibbles: torch.Tensor, channel_scale: torch.Tensor, n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `repack_w4a8`: codes int8 [N, K] and scale fp32 [N, 1]."""
    byte = nibbles.to(torch.int32)
    halves = torch.stack([((byte & 15) ^ 8) - 8, byte >> 4], dim=2)  # [blocks, N_pad, 2, 64]
    codes = halves.transpose(0, 1).reshape(nibbles.shape[1], -1)
    return codes[:n].to(torch.int8), channel_scale[:n, None] * 16
