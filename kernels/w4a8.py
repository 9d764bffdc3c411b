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
16 w[kk]: the sign comes along, three operations for eight weights (0.375 per weight). The 16 is in
channel_scale. The int32 sum cannot overflow below K = 132,000: 16 * 8 * 127 * K < 2^31. It is
exact, also across splits of K, and scaled once at the end:

    out[m, n] = sum * (token_scale[m] * channel_scale[n]) + bias[n]

Why each regime has its shape (the numbers of tokens are data: tiles.json):

    split_k, stream_k   Few tokens: bound by memory. More: by work that does not divide, for an
                        output has 14 to 300 tiles for 132 SMs. W x^T, the unpacked weights go to
                        the tensor cores from registers, and work is divided in equal shares along
                        K (sharing.py). Partial sums are int32: the same however K is divided.
    prefill             Many: bound by the tensor cores, at twice the bf16 rate. The same loop
                        undivided; 128 x 128 outputs by four warps, two programs per SM, so that one
                        unpacks while the other multiplies.

Activations are quantized per token by quantize_activation.py, fused there with what precedes. Where
128 does not divide K it adds zeros as the weights have them, and K here is a multiple of 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qig_serve.kernels import (
    launch,
    layout,
    library,
    quantize_activation,
    quantizer_ops,
    sharing,
)
from qig_serve.kernels.launch import Scratch
from qig_serve.kernels.library import Prepared
from qig_serve.kernels.tiles import Regime, Tile, select

FUSES_ACTIVATIONS = True
"""Whether vLLM's graphs are to put the norm or SiLU before a linear into its quantizer."""


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
def scaled(acc, token_scale_ptr, channel_scale_ptr, rows, tokens, M, N):
    """acc int32 [BLOCK_N, BLOCK_M] with the scales of its rows and tokens: fp32."""
    token_scale = tl.load(token_scale_ptr + tokens, mask=tokens < M, other=0.0)
    channel_scale = tl.load(channel_scale_ptr + rows, mask=rows < N, other=0.0)
    return acc.to(tl.float32) * (token_scale[None, :] * channel_scale[:, None])


@triton.jit
def _store(
    out_ptr, acc, token_scale_ptr, channel_scale_ptr, bias_ptr, rows, tokens, M, N,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """acc int32 [BLOCK_N, BLOCK_M], scaled -> out [M, N]."""
    out = scaled(acc, token_scale_ptr, channel_scale_ptr, rows, tokens, M, N)
    sharing.store_out(out_ptr, out, bias_ptr, rows, tokens, M, N, HAS_BIAS)


@triton.jit
def sum_of_products(
    codes_ptr, nibbles_ptr, rows, tokens, block_first, block_last, M, K, N_PAD,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, USE_PTX: tl.constexpr,
):  # fmt: skip
    """16 * codes^T weights over blocks of 128 inputs: int32 [BLOCK_N, BLOCK_M].

    tokens [BLOCK_M]: rows of codes; of those not below M nothing counts.
    """
    # A half-filled last tile reads the last row again rather than past the end.
    nibble_ptrs = (
        nibbles_ptr + tl.minimum(rows, N_PAD - 1)[:, None] * 64 + tl.arange(0, 64)[None, :]
    )
    rows_read = tl.minimum(tokens, M - 1)[None, :].to(tl.int64)
    code_ptrs = codes_ptr + rows_read * K + tl.arange(0, 128)[:, None]
    in_range = (tokens < M)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for block in tl.range(block_first, block_last, num_stages=STAGES):
        weights = _unpack(tl.load(nibble_ptrs + block * N_PAD * 64), BLOCK_N, USE_PTX)
        codes = sharing.load_tokens(code_ptrs + block * 128, in_range, BLOCK_M)  # [128, BLOCK_M]
        acc = tl.dot(weights, codes, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _part(
    first, last, codes_ptr, token_scale_ptr, nibbles_ptr, channel_scale_ptr, bias_ptr, out_ptr,
    partials_ptr, counter_ptr, M, N, K, N_PAD, tiles_m, size, rest,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_BIAS: tl.constexpr, USE_PTX: tl.constexpr,
):  # fmt: skip
    """Units from `first` to the end of its output tile, or to `last`; -> the unit after them."""
    blocks = K // 128
    tile = first // blocks
    start = first - tile * blocks
    end = tl.minimum(blocks, start + last - first)
    rows = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tile % tiles_m * BLOCK_M
    tokens = token + tl.arange(0, BLOCK_M)
    acc = sum_of_products(
        codes_ptr, nibbles_ptr, rows, tokens, start, end, M, K, N_PAD,
        BLOCK_M, BLOCK_N, STAGES, USE_PTX,
    )  # fmt: skip
    if end - start == blocks:
        _store(
            out_ptr, acc, token_scale_ptr, channel_scale_ptr, bias_ptr, rows, tokens, M, N,
            HAS_BIAS,
        )  # fmt: skip
    else:
        here = tl.minimum(M - token, BLOCK_M)
        complete, one, other = sharing.leave_part(
            acc, partials_ptr, counter_ptr, tile, blocks, size, rest, start == 0, here,
            BLOCK_M, BLOCK_N, ALIGNED,
        )  # fmt: skip
        if complete:
            SOME: tl.constexpr = min(8, BLOCK_M)
            for i in tl.range(0, here, SOME):
                total = sharing.add_parts(
                    partials_ptr, one, other, i, BLOCK_M, BLOCK_N, SOME, ALIGNED
                )
                some = token + i + tl.arange(0, SOME)
                _store(
                    out_ptr, total, token_scale_ptr, channel_scale_ptr, bias_ptr, rows, some, M, N,
                    HAS_BIAS,
                )  # fmt: skip
    return first + end - start


@triton.jit(do_not_specialize=["M", "tiles_m", "size", "rest"])
def w4a8_shared_kernel(
    codes_ptr, token_scale_ptr, nibbles_ptr, channel_scale_ptr, bias_ptr, out_ptr,
    partials_ptr, counter_ptr, M, N, K, N_PAD, tiles_m, size, rest,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_BIAS: tl.constexpr, USE_PTX: tl.constexpr, PDL: tl.constexpr, FETCH: tl.constexpr,
):  # fmt: skip
    """Grid (programs,), each with an equal share of the units (tile, block of 128 inputs)."""
    blocks = K // 128
    first, last = sharing.share(blocks, size, rest, ALIGNED)
    if PDL:
        ahead = (first % blocks * N_PAD + first // blocks // tiles_m * BLOCK_N) // 2
        line = tl.minimum(ahead + tl.arange(0, BLOCK_N // 2), blocks * N_PAD // 2 - 1)
        sharing.start_early(nibbles_ptr + line * 128, PDL, FETCH)
    if ALIGNED:  # no share crosses a tile
        _part(
            first, last, codes_ptr, token_scale_ptr, nibbles_ptr, channel_scale_ptr, bias_ptr,
            out_ptr, partials_ptr, counter_ptr, M, N, K, N_PAD, tiles_m, size, rest,
            BLOCK_M, BLOCK_N, STAGES, ALIGNED, HAS_BIAS, USE_PTX,
        )  # fmt: skip
    else:
        while first < last:
            first = _part(
                first, last, codes_ptr, token_scale_ptr, nibbles_ptr, channel_scale_ptr, bias_ptr,
                out_ptr, partials_ptr, counter_ptr, M, N, K, N_PAD, tiles_m, size, rest,
                BLOCK_M, BLOCK_N, STAGES, ALIGNED, HAS_BIAS, USE_PTX,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def w4a8_prefill_kernel(
    codes_ptr, token_scale_ptr, nibbles_ptr, channel_scale_ptr, bias_ptr, out_ptr,
    M, N, K, N_PAD,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, USE_PTX: tl.constexpr, PDL: tl.constexpr, FETCH: tl.constexpr,
):  # fmt: skip
    """Grid (output tiles,), GROUP_M token tiles beside each other for L2."""
    tile_m, tile = sharing.grouped(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N_PAD, BLOCK_N), GROUP_M
    )
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if PDL:
        line = tl.minimum(tile * BLOCK_N // 2 + tl.arange(0, BLOCK_N // 2), N_PAD // 2 - 1)
        sharing.start_early(nibbles_ptr + line * 128, PDL, FETCH)
    acc = sum_of_products(
        codes_ptr, nibbles_ptr, rows, tokens, 0, K // 128, M, K, N_PAD,
        BLOCK_M, BLOCK_N, STAGES, USE_PTX,
    )  # fmt: skip
    _store(out_ptr, acc, token_scale_ptr, channel_scale_ptr, bias_ptr, rows, tokens, M, N, HAS_BIAS)


def prepare(tensors: Prepared, dtype: torch.dtype) -> Prepared:
    """The checkpoint's tensors of one linear (formats.tensor_specs) in the kernels' layout."""
    return layout.repack_w4a8(tensors["weight_packed"], tensors["weight_scale"])


def zeros(n: int, k: int, device: torch.device) -> Prepared:
    """Tensors of zero weights [N, K], in the shapes of `prepare`."""
    groups = layout.padded_inputs(k) // layout.GROUP
    shape = (groups, layout.padded_rows(n), layout.GROUP // 2)
    return {
        "weight_nibbles": torch.zeros(shape, dtype=torch.int8, device=device),
        "channel_scale": torch.zeros(shape[1], dtype=torch.float32, device=device),
    }


def linear(
    x: torch.Tensor, prepared: Prepared, n: int, bias: torch.Tensor | None, tile: Tile,
    scratch: Scratch, use_ptx: bool = True,
) -> torch.Tensor:  # fmt: skip
    """x [M, K] contiguous, quantized, times the prepared weight transposed (+ bias): [M, N]."""
    codes, token_scale = quantize_activation.quantize(x)
    return product(codes, token_scale, prepared, n, bias, x.dtype, tile, scratch, use_ptx)


def product(
    codes: torch.Tensor,
    token_scale: torch.Tensor,
    prepared: Prepared,
    n: int,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
    scratch: Scratch,
    use_ptx: bool = True,
) -> torch.Tensor:
    """codes int8 [M, K] contiguous, token_scale fp32 [M], the prepared weight -> [M, N] of `dtype`.

    K: in whole groups, as quantize_activation.quantize has it. use_ptx=False takes the
    pure Triton twin. ValueError if the scratch memory does not suffice.
    """
    m, k = codes.shape
    nibbles, channel_scale = prepared["weight_nibbles"], prepared["channel_scale"]
    n_pad = nibbles.shape[1]
    out = torch.empty(m, n, dtype=dtype, device=codes.device)
    launch.run(
        w4a8_prefill_kernel, w4a8_shared_kernel,
        (codes, token_scale, nibbles, channel_scale, bias, out), (m, n, k, n_pad), n_pad, tile,
        scratch, torch.int32, HAS_BIAS=bias is not None, USE_PTX=use_ptx,
    )  # fmt: skip
    return out


def candidates(m: int) -> list[Tile]:
    """Tiles to try at M tokens; what does not fit a device is skipped."""
    block_m = max(8, 1 << (m - 1).bit_length())
    shapes: tuple[tuple[Regime, int, int, int, tuple[int, ...]], ...] = (
        ("split_k", 8, 64, 2, (4, 8)), ("split_k", 8, 32, 1, (16,)), ("split_k", 16, 64, 2, (8,)),
        ("split_k", 16, 64, 4, (8,)), ("split_k", 16, 128, 4, (4, 5, 6)),
        ("split_k", 16, 256, 4, (2, 3)), ("split_k", 32, 64, 4, (5, 8)),
        ("split_k", 32, 128, 4, (3, 4, 5)), ("split_k", 64, 64, 4, (4, 6)),
        ("split_k", 64, 128, 4, (2, 3, 4)), ("split_k", 128, 64, 4, (3,)),
        ("stream_k", 64, 128, 4, (2, 3)), ("stream_k", 128, 256, 8, (1,)),
        ("stream_k", 128, 128, 4, (2,)),
    )  # fmt: skip
    tiles = [
        Tile(regime, tokens, block_n, warps, stages, programs, early=early)
        for regime, tokens, block_n, warps, offered in shapes
        if block_m // 4 <= tokens <= max(block_m, 16)
        for stages in (3, 4)
        for programs in offered
        for early in (-1, 1)
    ]
    if m >= 128:
        tiles += [
            Tile("prefill", 128, block_n, warps, stages)
            for block_n, warps in ((64, 4), (128, 4), (128, 8), (256, 8))
            for stages in (3, 4)
        ]
    return tiles


def kernel(tile: Tile, dtype: str, orders: launch.Orders) -> launch.Kernel:
    """What a launch with the tile compiles, for `dtype` ("bf16", "fp16")."""
    arguments = dict(
        codes_ptr="*i8", token_scale_ptr="*fp32", nibbles_ptr="*i8", channel_scale_ptr="*fp32",
        bias_ptr=f"*{dtype}", out_ptr=f"*{dtype}", M="i32", N="i32", K="i32", N_PAD="i32",
    )  # fmt: skip
    return launch.of_linear(w4a8_prefill_kernel, w4a8_shared_kernel, arguments, {}, tile, "i32")


def unsupported(k: int) -> str:
    """Why a linear of K inputs cannot run; empty if it can."""
    if k > quantize_activation.MAX_K:
        return f"w4a8 takes at most K={quantize_activation.MAX_K}, got K={k}"
    return ""


def warm_up(k: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile what quantizes activations, alone and fused with what precedes it."""
    quantizer_ops.warm_up_codes(k, dtype, device)


def _w4a8_linear(
    codes: torch.Tensor,
    token_scale: torch.Tensor,
    weight_nibbles: torch.Tensor,
    channel_scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    m, k = codes.shape
    if m == 0:
        return codes.new_empty(0, n, dtype=dtype)
    tile = select("w4a8", launch.architecture(codes.device), n, k, m)
    prepared = {"weight_nibbles": weight_nibbles, "channel_scale": channel_scale}
    return product(
        library.aligned(codes), token_scale, prepared, n, bias, dtype, tile,
        launch.scratch(codes.device), library.use_ptx(codes),
    )  # fmt: skip


library.define(
    "w4a8_linear(Tensor codes, Tensor token_scale, Tensor weight_nibbles, Tensor channel_scale, "
    "Tensor? bias, int n, ScalarType dtype) -> Tensor",
    _w4a8_linear,
    lambda codes, token_scale, weight_nibbles, channel_scale, bias, n, dtype: codes.new_empty(
        codes.shape[0], n, dtype=dtype
    ),
)


def apply(x: torch.Tensor, prepared: Prepared, n: int, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] -> [M, N] through the ops, with the tile of tiles.json."""
    codes, token_scale = torch.ops.qig.quantize_activation(x)
    return torch.ops.qig.w4a8_linear(
        codes, token_scale, prepared["weight_nibbles"], prepared["channel_scale"], bias, n, x.dtype
    )
