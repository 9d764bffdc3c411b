"""W4A8: int8 activations [M, K] times 4-bit weights [N, K] transposed, on int8 tensor cores.

Checkpoint layout (formats.py): eight signed 4-bit codes an int32 word, lowest first.

    | w7 w6 w5 w4 w3 w2 w1 w0 |

Kernel layout (layout.py): a byte holds the codes of two inputs 64 apart, in blocks of 128 inputs.

    bit           7 ... 4         3 ... 0
    byte kk       w[64 + kk]      w[kk]        kk = 0..63
    weight_nibbles int8 [K/128, N, 64]: 128 rows of a block are 8 KiB, contiguous
    channel_scale  fp32 [N]: the scale divided by 16

A register of the tensor core's left operand is four neighbouring bytes. From one such register
`p & 0xF0F0F0F0` is four times 16 w[64 + kk] as int8 and `(p << 4) & 0xF0F0F0F0` four times
16 w[kk]: the sign comes along, three operations for eight weights (0.375 a weight). The 16 is in
channel_scale. The int32 sum cannot overflow below K = 132,000: 16 * 8 * 127 * K < 2^31. It is
exact, also across splits of K, and scaled once at the end:

    out[m, n] = sum * (token_scale[m] * channel_scale[n]) + bias[n]

Why each regime has its shape:

    decode, M <= 64   Bound by memory. W x^T, the unpacked weights go to the tensor cores from
                      registers. K is split so that all SMs have work; int32 partial sums go
                      to a workspace and the last program of an output tile to arrive adds them.
    prefill, M > 64   Bound by the tensor cores, at twice the bf16 rate. The same loop without the
                      split; larger tiles, so that a weight is unpacked once for BLOCK_M tokens.

Activations are quantized a token by quantize_activation.py, fused there with what precedes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qig_serve.kernels import launch
from qig_serve.kernels.tuning import Tile

MAX_K = (1 << 31) // (16 * 8 * 127) // 128 * 128
"""Largest K whose int32 sum of 16 * code * activation cannot overflow."""

UNPACK_PTX = tl.constexpr(
    """{ .reg .b32 t;
    shl.b32 t, $2, 4;
    and.b32 $0, t, 0xF0F0F0F0;
    and.b32 $1, $2, 0xF0F0F0F0; }"""
)


@triton.jit
def _unpack(nibbles, ROWS: tl.constexpr, USE_PTX: tl.constexpr):
    """Bytes [R, 64] -> 16 * codes, int8 [R, 128] in the order of k."""
    if USE_PTX:
        low, high = tl.inline_asm_elementwise(
            UNPACK_PTX, "=&r,=&r,r", [nibbles], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        low = (nibbles << 4).to(tl.int8)
        high = (nibbles & -16).to(tl.int8)
    return tl.join(low, high).permute(0, 2, 1).reshape(ROWS, 128)


@triton.jit
def _store(
    out_ptr, acc, token_scale_ptr, channel_scale_ptr, bias_ptr, rows, tokens, M, N,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """acc int32 [BLOCK_N, BLOCK_M], scaled -> out [M, N]."""
    token_scale = tl.load(token_scale_ptr + tokens, mask=tokens < M, other=0.0)
    channel_scale = tl.load(channel_scale_ptr + rows)
    out = acc.to(tl.float32) * (token_scale[None, :] * channel_scale[:, None])
    if HAS_BIAS:
        out += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    where = out_ptr + tokens[None, :].to(tl.int64) * N + rows[:, None]
    mask = (tokens < M)[None, :] & (rows < N)[:, None]
    tl.store(where, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_of_products(
    codes_ptr, nibbles_ptr, tile, tokens, block_first, block_last, M, K, N_PAD,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, USE_PTX: tl.constexpr,
):  # fmt: skip
    """16 * codes^T weights over blocks of 128 inputs: int32 [BLOCK_N, BLOCK_M]."""
    # A last half-filled tile reads some row twice rather than past the end.
    rows = tl.minimum(tile * BLOCK_N, N_PAD - BLOCK_N) + tl.arange(0, BLOCK_N)
    nibble_ptrs = nibbles_ptr + rows[:, None] * 64 + tl.arange(0, 64)[None, :]
    rows_read = tl.minimum(tokens, M - 1)[None, :].to(tl.int64)
    code_ptrs = codes_ptr + rows_read * K + tl.arange(0, 128)[:, None]
    in_range = (tokens < M)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for block in tl.range(block_first, block_last, num_stages=STAGES):
        weights = _unpack(tl.load(nibble_ptrs + block * N_PAD * 64), BLOCK_N, USE_PTX)
        codes = launch.load_tokens(code_ptrs + block * 128, in_range, BLOCK_M)  # [128, BLOCK_M]
        acc = tl.dot(weights, codes, acc, out_dtype=tl.int32)
    return acc


@triton.jit(do_not_specialize=["M", "blocks_a_split"])
def w4a8_decode_kernel(
    codes_ptr, token_scale_ptr, nibbles_ptr, channel_scale_ptr, bias_ptr, out_ptr,
    workspace_ptr, counter_ptr, M, N, K, N_PAD, blocks_a_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, USE_PTX: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of BLOCK_N outputs, splits of K, tiles of BLOCK_M tokens)."""
    tile, split = tl.program_id(0), tl.program_id(1)
    rows = tl.minimum(tile * BLOCK_N, N_PAD - BLOCK_N) + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    block_first = split * blocks_a_split
    block_last = tl.minimum(block_first + blocks_a_split, K // 128)
    acc = _sum_of_products(
        codes_ptr, nibbles_ptr, tile, tokens, block_first, block_last, M, K, N_PAD,
        BLOCK_M, BLOCK_N, STAGES, USE_PTX,
    )  # fmt: skip
    if SPLIT:
        splits = tl.num_programs(1)
        in_range = (tokens < M)[None, :]
        inside = tl.arange(0, BLOCK_M)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        output_tile = tl.program_id(2) * tl.num_programs(0) + tile
        partials = workspace_ptr + output_tile.to(tl.int64) * splits * (BLOCK_N * BLOCK_M) + inside
        tl.store(partials + split * (BLOCK_N * BLOCK_M), acc, mask=in_range)
        tl.debug_barrier()  # all of this program's stores before the counter says so
        arrived = tl.atomic_add(counter_ptr + output_tile, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
            for i in tl.range(0, splits, loop_unroll_factor=4):
                there = partials + i * (BLOCK_N * BLOCK_M)
                acc += tl.load(there, mask=in_range, other=0, cache_modifier=".cg")
            tl.store(counter_ptr + output_tile, 0)  # ready for the next launch
            _store(
                out_ptr, acc, token_scale_ptr, channel_scale_ptr, bias_ptr, rows, tokens, M, N,
                HAS_BIAS,
            )  # fmt: skip
    else:
        _store(
            out_ptr, acc, token_scale_ptr, channel_scale_ptr, bias_ptr, rows, tokens, M, N,
            HAS_BIAS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def w4a8_prefill_kernel(
    codes_ptr, token_scale_ptr, nibbles_ptr, channel_scale_ptr, bias_ptr, out_ptr,
    M, N, K, N_PAD,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, USE_PTX: tl.constexpr,
):  # fmt: skip
    """Grid (output tiles of BLOCK_N x BLOCK_M,), GROUP_M token tiles beside each other for L2."""
    tile_m, tile = launch.grouped(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N_PAD, BLOCK_N), GROUP_M
    )
    rows = tl.minimum(tile * BLOCK_N, N_PAD - BLOCK_N) + tl.arange(0, BLOCK_N)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = _sum_of_products(
        codes_ptr, nibbles_ptr, tile, tokens, 0, K // 128, M, K, N_PAD,
        BLOCK_M, BLOCK_N, STAGES, USE_PTX,
    )  # fmt: skip
    _store(out_ptr, acc, token_scale_ptr, channel_scale_ptr, bias_ptr, rows, tokens, M, N, HAS_BIAS)


def linear(
    codes: torch.Tensor,
    token_scale: torch.Tensor,
    nibbles: torch.Tensor,
    channel_scale: torch.Tensor,
    counters: torch.Tensor,
    workspace: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    dtype: torch.dtype,
    tile: Tile,
    use_ptx: bool = True,
) -> torch.Tensor:
    """codes int8 [M, K] contiguous, token_scale fp32 [M], layout.repack_w4a8's tensors -> [M, N].

    bias [N] or None; the result is of `dtype`. counters: int32 zeros, one an output tile
    (launch.counters); left at zero. workspace: int32 scratch of launch.workspace_size(tile).
    use_ptx=False takes the pure Triton twin.
    """
    m, k = codes.shape
    n_pad = nibbles.shape[1]
    # Fewer rows than a tile: the tile is cut to them (both are powers of two times 128).
    block_n = min(tile.block_n, n_pad)
    out = torch.empty(m, n, dtype=dtype, device=codes.device)
    tiles_m, tiles_n = triton.cdiv(m, tile.block_m), triton.cdiv(n_pad, block_n)
    shape = dict(BLOCK_M=tile.block_m, BLOCK_N=block_n, STAGES=tile.num_stages)
    options = dict(HAS_BIAS=bias is not None, USE_PTX=use_ptx, **launch.options(tile))
    tensors = (codes, token_scale, nibbles, channel_scale, bias, out)
    if tile.regime == "prefill":
        w4a8_prefill_kernel[(tiles_m * tiles_n,)](
            *tensors, m, n, k, n_pad, GROUP_M=tile.group_m, **shape, **options
        )
        return out
    splits, a_split = launch.split_k(tile, tiles_n * tiles_m, k // 128, codes.device)
    partials = launch.partial_sums(workspace, splits, tiles_n * tiles_m, tile, torch.int32)
    w4a8_decode_kernel[(tiles_n, splits, tiles_m)](
        *tensors, partials, counters, m, n, k, n_pad, a_split,
        SPLIT=splits > 1, **shape, **options,
    )  # fmt: skip
    return out
