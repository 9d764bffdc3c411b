"""Checkpoint layout (formats.py) -> the layout that the kernels read, once, at load.

Pure torch, on CPU or CUDA, no triton. The layouts are private to the kernels and may change with
them; what is stored on disk does not. They are drawn in the headers of halves.py and w4a8.py.
N is padded to a multiple of ROW_TILE with zero scales, and K to whole groups with zero codes, so no
kernel masks a weight load.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qig_serve.packing import unpack

ROW_TILE = 128
"""Output rows that a tile of either layout holds."""
GROUP = 128
"""Inputs along K that a tile holds: a scale group of w3a16, a block of w4a8."""
_ROWS_AT_ONCE = 32 * ROW_TILE  # bounds the int64 temporaries of unpacking


def padded_rows(n: int) -> int:
    """N rounded up to whole tiles."""
    return -(-n // ROW_TILE) * ROW_TILE


def _pad_rows(tensor: torch.Tensor) -> torch.Tensor:
    return F.pad(tensor, (0, 0, 0, padded_rows(tensor.shape[0]) - tensor.shape[0]))


PAIR = 2 * GROUP
"""Inputs of two groups, which the w3a16 layout keeps together; K is padded to whole pairs."""


def _order(span: int) -> tuple[int, ...]:
    """The input that lies at each of 128 places."""
    fours = [4 * (q // 4) + (0, 2, 1, 3)[q % 4] for q in range(GROUP)]
    if span == 4:
        return tuple(fours)
    sixteen = [q // 16 * 16 + q % 2 * 8 + q % 16 // 4 * 2 + q // 2 % 2 for q in range(GROUP)]
    if span == 16:  # place (t, e, h) of 16 holds (h, t, e)
        return tuple(sixteen)
    if span == 8:  # place (t, j, i) of 32, t and i of four, holds what place (j, t, i) of 16's does
        return tuple(
            sixteen[q // 32 * 32 + 16 * (q // 4 % 2) + 4 * (q // 8 % 4) + q % 4]
            for q in range(GROUP)
        )
    # place (j, t, i) of 32, t and i of four, holds (t, j, i), and i as above
    return tuple(
        q // 32 * 32 + fours[8 * (q // 4 % 4) + 4 * (q // 16 % 2) + q % 4] for q in range(GROUP)
    )


ORDERS = {span: _order(span) for span in (4, 8, 16, 32)}
"""Orders in which 128 inputs are stored, by the span within which they are permuted (halves.py).

8: that of 16, for operands of eight neighbours per thread, which permutes within 32."""


def padded_pairs(k: int) -> int:
    """Pairs of groups of K inputs."""
    return -(-k // PAIR)


def padded_inputs(k: int) -> int:
    """K rounded up to whole groups."""
    return -(-k // GROUP) * GROUP


def whole_groups(rows: torch.Tensor) -> torch.Tensor:
    """[R, K] with zeros behind a last group that is shorter."""
    missing = -rows.shape[1] % GROUP
    return F.pad(rows, (0, missing)) if missing else rows


def repack_w3a16(
    packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, order: int
) -> dict[str, torch.Tensor]:
    """Tensors of formats.tensor_specs("w3a16") -> `weight_planes` and `scale_zero`.

    packed int32 [N, K * 3 / 32], scale [N, G] of 16 bits, zero uint8 [N, G], G = ceil(K / 128);
    order: 16 or 32, of the device's tensor cores. Returns weight_planes int8 [pairs, N_pad / 128,
    2, 3, 128, 16] and scale_zero int32 [pairs, N_pad, 2]: the bits of the scale in fp32, and in its
    last three, which are zero in a scale of 16 bits, the zero point."""
    n, words = packed.shape
    groups = padded_inputs(words * 32 // 3) // GROUP
    tiles, pairs = padded_rows(n) // ROW_TILE, padded_pairs(groups * GROUP)
    planes = torch.zeros(pairs * 2, tiles, 3, ROW_TILE, 16, dtype=torch.int8, device=packed.device)
    for start in range(0, n, _ROWS_AT_ONCE):
        codes = _pad_rows(unpack(packed[start : start + _ROWS_AT_ONCE], 3, signed=False))
        codes = whole_groups(codes)
        first, some = start // ROW_TILE, codes.shape[0] // ROW_TILE
        planes[:groups, first : first + some] = _pack_planes(codes, order)
    planes = planes.unflatten(0, (pairs, 2)).transpose(1, 2).contiguous()
    bits = scale.float().view(torch.int32) | zero.to(torch.int32)
    bits = F.pad(_pad_rows(bits), (0, pairs * 2 - groups))
    scale_zero = bits.reshape(-1, pairs, 2).transpose(0, 1).contiguous()
    return {"weight_planes": planes, "scale_zero": scale_zero}


def _pack_planes(codes: torch.Tensor, order: int) -> torch.Tensor:
    """uint8 codes [128 * T, K] -> int8 [G, T, 3, 128, 16]."""
    ordered = codes.reshape(-1, ROW_TILE, codes.shape[1] // GROUP, GROUP)[..., ORDERS[order]]
    c = ordered.unflatten(-1, (8, 16)).permute(3, 2, 0, 1, 4)  # [j, G, T, row, position]
    planes = (
        c[0] | c[4] << 3 | (c[3] & 3) << 6,
        c[1] | c[5] << 3 | (c[7] & 3) << 6,
        c[2] | c[6] << 3 | (c[3] >> 2) << 6 | (c[7] >> 2) << 7,
    )
    return torch.stack(planes, dim=2).view(torch.int8)


def unpack_w3a16(
    planes: torch.Tensor, scale_zero: torch.Tensor, n: int, k: int, order: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inverse of `repack_w3a16`: codes uint8 [N, K], scale [N, G] of `dtype`, zero uint8 [N, G]."""
    a, b, c = planes.contiguous().view(torch.uint8).unbind(3)  # [pairs, T, 2, row, position]
    whole = [plane >> shift & 7 for shift in (0, 3) for plane in (a, b, c)]
    gathered = [a >> 6 | (c >> 6 & 1) << 2, b >> 6 | c >> 7 << 2]
    by_j = torch.stack([*whole[:3], gathered[0], *whole[3:], gathered[1]], dim=4)
    codes = torch.empty_like(by_j.flatten(-2))  # [pairs, T, 2, row, 128]
    codes[..., ORDERS[order]] = by_j.flatten(-2)
    codes = codes.permute(1, 3, 0, 2, 4).reshape(planes.shape[1] * ROW_TILE, -1)
    word = scale_zero.permute(1, 0, 2).reshape(scale_zero.shape[1], -1)
    word = word[:n, : padded_inputs(k) // GROUP]
    scale = (word & ~7).contiguous().view(torch.float32).to(dtype)
    return codes[:n, :k], scale, (word & 7).to(torch.uint8)


def repack_w8a16(codes: torch.Tensor, scale: torch.Tensor, order: int) -> dict[str, torch.Tensor]:
    """8-bit weights, symmetric, a scale per row -> `weight_bytes` and `row_scale`.

    codes int8 [N, K], scale fp32 [N, 1]; order as the activations' halves have it. Returns
    weight_bytes int8 [pairs, N_pad / 128, 2, 128, 128] and row_scale fp32 [N_pad], 8 times the
    scale (x's is an eighth)."""
    pairs = padded_pairs(codes.shape[1])
    padded = F.pad(_pad_rows(codes), (0, pairs * PAIR - codes.shape[1]))
    ordered = padded.reshape(-1, ROW_TILE, pairs, 2, GROUP)[..., ORDERS[order]]
    data = ordered.permute(2, 0, 3, 1, 4).contiguous()
    return {
        "weight_bytes": data,
        "row_scale": _pad_rows(scale.float() * 8).reshape(-1).contiguous(),
    }


def repack_w4a8(packed: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of formats.tensor_specs("w4a8") -> `weight_nibbles` and `channel_scale`.

    packed int32 [N, K / 8], scale fp32 [N, 1]. Returns weight_nibbles int8
    [ceil(K / 128), N_pad, 64] and channel_scale fp32 [N_pad], divided by 16 because the kernel
    multiplies with 16 times the code.
    """
    n, words = packed.shape
    blocks = padded_inputs(words * 8) // GROUP
    nibbles = torch.empty(blocks, padded_rows(n), 64, dtype=torch.int8, device=packed.device)
    for start in range(0, n, _ROWS_AT_ONCE):
        codes = _pad_rows(unpack(packed[start : start + _ROWS_AT_ONCE], 4, signed=True))
        codes = whole_groups(codes)
        halves = codes.to(torch.int32).reshape(-1, blocks, 2, 64)  # k 0..63 and 64..127
        byte = (halves[:, :, 0] & 15) | (halves[:, :, 1] << 4)  # within -128..127
        nibbles[:, start : start + codes.shape[0]] = byte.to(torch.int8).transpose(0, 1)
    channel_scale = _pad_rows(scale.float().reshape(n, 1) / 16).reshape(-1).contiguous()
    return {"weight_nibbles": nibbles, "channel_scale": channel_scale}


def unpack_w4a8(
    nibbles: torch.Tensor, channel_scale: torch.Tensor, n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `repack_w4a8`: codes int8 [N, K] and scale fp32 [N, 1], K in whole groups."""
    byte = nibbles.to(torch.int32)
    halves = torch.stack([((byte & 15) ^ 8) - 8, byte >> 4], dim=2)  # [blocks, N_pad, 2, 64]
    codes = halves.transpose(0, 1).reshape(nibbles.shape[1], -1)
    return codes[:n].to(torch.int8), channel_scale[:n, None] * 16
