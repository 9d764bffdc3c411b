"""Two 4-bit weights a byte, and sums of their products: what the w4a8 kernels share (w4a8.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from qig_serve.kernels import launch

UNPACK_PTX = tl.constexpr(
    """{ .reg .b32 t;
    shl.b32 t, $2, 4;
    and.b32 $0, t, 0xF0F0F0F0;
    and.b32 $1, $2, 0xF0F0F0F0; }"""
)


@triton.jit
def unpack(nibbles, ROWS: tl.constexpr, USE_PTX: tl.constexpr):
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
def store(
    out_ptr, acc, token_scale_ptr, channel_scale_ptr, bias_ptr, rows, tokens, M, N,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """acc int32 [BLOCK_N, BLOCK_M], scaled -> out [M, N]."""
    token_scale = tl.load(token_scale_ptr + tokens, mask=tokens < M, other=0.0)
    channel_scale = tl.load(channel_scale_ptr + rows, mask=rows < N, other=0.0)
    out = acc.to(tl.float32) * (token_scale[None, :] * channel_scale[:, None])
    launch.store_out(out_ptr, out, bias_ptr, rows, tokens, M, N, HAS_BIAS)
