"""W3A16: x [M, K] (bf16, fp16) times a dense 3-bit weight [N, K] transposed, groups of 128 along K.

    out[m, n] = sum_g scale[n, g] * sum_{k in g} x[m, k] * (code[n, k] - zero[n, g])  (+ bias[n])

Read on in this order: `lane_ptx` (a lane's five numbers, in PTX) and its twin `_code`, `_unpack`,
`w3a16_decode_kernel`, `linear`.

Checkpoint layout (formats.py): a row's codes w0, w1, ... are a stream of 3-bit fields, lowest bits
first; 32 of them are three int32 words, and w10 and w21 lie across two words.

    word 0                     word 1                    word 2
    w0 w1 ... w9 w10(2 bits)   w10(1) w11 ... w21(1)     w21(2) w22 ... w31

Kernel layout (layout.py): a tile is one group of 128 rows, and what a thread needs lies together.
Rows r and 64 + r share three 16-bit lanes A, B, C for each kk = 0..15; `lo j` is the code of row r
at k = 16 j + kk, `hi j` that of row 64 + r. Five fields fill bits 0-14; bit 15 of the three lanes
together is the sixteenth code, hi7:

    bit     15     14-12  11-9   8-6    5-3    2-0
    lane A  hi7.0  lo4    lo3    lo2    lo1    lo0      weight_lanes int16 [G, N/128, 3, 64, 16]:
    lane B  hi7.1  hi1    hi0    lo7    lo6    lo5      (lane, r, kk), 6 KiB a tile, contiguous
    lane C  hi7.2  hi6    hi5    hi4    hi3    hi2

    scale_zero int32 [G, N]: the scale's 16 bits, above them the zero point

48 bits hold 16 codes: nothing is padded, 3.0 bits a code and 0.25 for scale and zero point. A
32-bit register holds one lane of two neighbouring kk, which is exactly a register of the tensor
core's left operand: a field is made a number in place, in both halves at once. Each `lo j` and
`hi j` is a slice of 16 k, one step of the tensor core, and the eight slices of a half are joined
to one [64, 128] operand that lies in registers already.

From a field to a number, in one instruction: `(w & 7 << p) | magic`, a lop3, writes the field at
bits p..p+2 into the mantissa of a float that has nothing else there. In bf16, 0x4300 is 128 and its
last mantissa bit is worth 1, so p = 0 gives 128 + v; 0x4180 is 16 with a last bit worth 1/8, so
p = 3, without a shift, gives 16 + v. In general magic is 2^(b-p), b = 7 mantissa bits in bf16 and
10 in fp16. bf16 has room for p = 0 to 4, so fields 0 and 3 need no shift, fields 6 and 9 come
down by one shift by 6, and field 12 by a shift by 12, 11 or 10 in lanes A, B, C. That choice
leaves bit 15 of the lanes at bits 3, 4, 5, where three lop3 gather the sixteenth code. Then one
packed addition takes 2^(b-p) + zero away, exactly: what reaches the tensor core is the integer
v - zero, within -7..7, and no sum of x is needed to correct for an offset.

Operations for the 32 weights in the three registers of two kk:

    shifts, integer                              6      0.19 a weight
    lop3: 15 fields, 3 for the sixteenth        18      0.56
    packed additions, not on the integer pipe   16     (0.50)
    zero point spread to 4 offsets a row         5 a row and group: 0.16
    addresses, masks, buffers, loop                     0.15 to 0.27, by tile

That is 1.05 to 1.18 integer instructions a weight; `make compile-report` counts them. The memory of
an H200 delivers a weight every 1.58 integer operations (by arithmetic: 132 SMs of 64 lanes at 1.98
GHz, 4.3 TB/s, 3.25 bits), so a shift, an and, a conversion and a subtraction each would not do.

Why each regime has its shape:

    decode, M <= 64   Bound by memory and issue slots. Tensor cores even at M = 1: dot products on
                      CUDA cores would take another operation a weight and token. W x^T, because
                      only the left operand is taken from registers. The group's sum of integer
                      weights is scaled in fp32 once: BLOCK_M / 128 operations a weight, and the
                      weights are exact. K is split so that all SMs have work (qkv and o have 28 to
                      48 tiles of 128 rows for 132 SMs); partial sums go to an fp32 workspace and
                      the last program of an output tile to arrive adds them in order, so the result
                      does not depend on which was last and no second kernel is launched.
    its tiles         256 rows for 16 or 32 tokens: a thread of four warps then has 256 weights
                      (128 registers) a group to share the loop's overhead. 64 tokens take eight
                      warps, where sums and products are 64 registers each, and on Hopper only:
                      mma.sync wants x in registers too and spills, sm_100 takes 2 instructions a
                      weight; there two tiles of 32 tokens unpack every weight twice.
    prefill, M > 64   Bound by the tensor cores: a tile's weights are unpacked once for BLOCK_M
                      = 128 tokens, and scaled in 16 bits (0.5 operations a weight more), because
                      taking the accumulator apart every group would stall the chain of wgmma.
    dequantize        Weights into 16-bit scratch, then cuBLAS: the floor the fused prefill has to
                      beat. Chosen where the tuning data says so (tuning.py), never on its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qig_serve.kernels import launch
from qig_serve.kernels.tuning import Tile

_MANTISSA = {"bf16": 7, "fp16": 10}
_BIAS = {"bf16": 127, "fp16": 15}
_LAST_SHIFT = (12, 11, 10)  # of lanes A, B, C: brings the left-over bits to 3, 4, 5
_LEFT_OVER = 3
_AND_OR, _BLEND = 0xEA, 0xE4  # lop3: (a & b) | c, and c ? a : b bit by bit


@triton.constexpr_function
def _magic(float_type: str, p: int) -> int:
    """Bits of 2^(b - p), to which a field at bits p..p+2 adds its value."""
    b = _MANTISSA[float_type]
    return (b - p + _BIAS[float_type]) << b


@triton.constexpr_function
def _twice(bits: int) -> str:
    return f"0x{bits << 16 | bits:08X}"


@triton.constexpr_function
def _field(out: str, word: str, zero: str, scale: str, p: int, float_type: str) -> str:
    """PTX: out = (field of word at p) - zero, times scale if there is one; two numbers at once."""
    magic = _magic(float_type, p)
    two = f"{float_type.replace('fp', 'f')}x2"
    lines = [
        f"mad.lo.u32 offset, {zero}, {1 << p}, {_twice(0x8000 | magic)};",
        f"lop3.b32 {out}, {word}, {_twice(7 << p)}, {_twice(magic)}, {_AND_OR};",
        f"fma.rn.{two} {out}, {out}, one, offset;",
    ]
    if scale:
        lines.append(f"fma.rn.{two} {out}, {out}, {scale}, minus_zero;")
    return "\n".join(lines)


@triton.constexpr_function
def _block(registers: str, body: list[str], float_type: str) -> str:
    one = _BIAS[float_type] << _MANTISSA[float_type]
    return "\n".join(
        [
            f"{{ .reg .b32 offset, one, minus_zero, {registers};",
            f"mov.b32 one, {_twice(one)};",
            f"mov.b32 minus_zero, {_twice(0x8000)};",
            *body,
            "}",
        ]
    )


@triton.constexpr_function
def lane_ptx(lane: int, float_type: str, scaled: bool) -> str:
    """PTX of a lane's five codes: $0-$4 out, $5 lane, of the halves zeros $6 $7, scales $8 $9."""
    shifts = (0, 0, 6, 6, _LAST_SHIFT[lane])
    positions = (0, 3, 0, 3, lane)
    body = ["mov.b32 t, $5;"]
    for i in range(5):
        if i in (2, 4):
            body.append(f"shr.u32 t, $5, {shifts[i]};")
        high = 5 * lane + i >= 8
        scale = ("$9" if high else "$8") if scaled else ""
        zero = "$7" if high else "$6"
        body.append(_field(f"${i}", "t", zero, scale, positions[i], float_type))
    return _block("t", body, float_type)


@triton.constexpr_function
def left_over_ptx(float_type: str, scaled: bool) -> str:
    """PTX of the sixteenth code: $0 out, $1 $2 $3 lanes, $4 zero and $5 scale of the upper half."""
    gather = [f"shr.u32 {t}, ${i + 1}, {_LAST_SHIFT[i]};" for i, t in enumerate("tuv")]
    gather.append(f"lop3.b32 t, t, u, {_twice(0x08)}, {_BLEND};")
    gather.append(f"lop3.b32 t, t, v, {_twice(0x18)}, {_BLEND};")
    field = _field("$0", "t", "$4", "$5" if scaled else "", _LEFT_OVER, float_type)
    return _block("t, u, v", [*gather, field], float_type)


@triton.constexpr_function
def _float_type(dtype: tl.dtype) -> str:
    return dtype.name  # "bf16" or "fp16"


@triton.jit
def _code(lane, SHIFT: tl.constexpr, zero, scale, DTYPE: tl.constexpr, SCALED: tl.constexpr):
    # Twin of _field: (lane >> SHIFT) & 7, minus zero, exact in any float; its bits as int16.
    value = (((lane >> SHIFT) & 7) - zero).to(tl.float32)
    if SCALED:
        value = value * scale.to(DTYPE, bitcast=True).to(tl.float32)
    return value.to(DTYPE).to(tl.int16, bitcast=True)


@triton.jit
def _five_codes(
    lane, zero_lo, zero_hi, scale_lo, scale_hi,
    LANE: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr, USE_PTX: tl.constexpr,
):  # fmt: skip
    """Lane [R, 16] int16 -> five planes [R, 16], bits of DTYPE; all int16."""
    if USE_PTX:
        ptx: tl.constexpr = lane_ptx(LANE, _float_type(DTYPE), SCALED)
        if SCALED:
            return tl.inline_asm_elementwise(
                ptx, "=&r,=&r,=&r,=&r,=&r,r,r,r,r,r",
                [lane, zero_lo, zero_hi, scale_lo, scale_hi],
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                ptx, "=&r,=&r,=&r,=&r,=&r,r,r,r", [lane, zero_lo, zero_hi],
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
            )  # fmt: skip
    else:
        zero_3 = zero_hi if LANE > 0 else zero_lo
        zero_2 = zero_hi if LANE > 1 else zero_lo
        scale_3 = scale_hi if LANE > 0 else scale_lo
        scale_2 = scale_hi if LANE > 1 else scale_lo
        return (
            _code(lane, 0, zero_2, scale_2, DTYPE, SCALED),
            _code(lane, 3, zero_2, scale_2, DTYPE, SCALED),
            _code(lane, 6, zero_2, scale_2, DTYPE, SCALED),
            _code(lane, 9, zero_3, scale_3, DTYPE, SCALED),
            _code(lane, 12, zero_3, scale_3, DTYPE, SCALED),
        )


@triton.jit
def _left_over_code(
    a, b, c, zero, scale, DTYPE: tl.constexpr, SCALED: tl.constexpr, USE_PTX: tl.constexpr
):  # fmt: skip
    if USE_PTX:
        ptx: tl.constexpr = left_over_ptx(_float_type(DTYPE), SCALED)
        if SCALED:
            return tl.inline_asm_elementwise(
                ptx, "=&r,r,r,r,r,r", [a, b, c, zero, scale], dtype=tl.int16, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                ptx, "=&r,r,r,r,r", [a, b, c, zero], dtype=tl.int16, is_pure=True, pack=2
            )
    else:
        code = ((a >> 15) & 1) | ((b >> 14) & 2) | ((c >> 13) & 4)
        return _code(code, 0, zero, scale, DTYPE, SCALED)


@triton.jit
def _join_slices(p0, p1, p2, p3, p4, p5, p6, p7, ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """Eight slices [R, 16] -> [R, 128] with k = 16 * slice + kk: no instruction on the GPU."""
    even = tl.join(tl.join(p0, p4), tl.join(p2, p6))
    odd = tl.join(tl.join(p1, p5), tl.join(p3, p7))
    return tl.join(even, odd).permute(0, 2, 3, 4, 1).reshape(ROWS, 128).to(DTYPE, bitcast=True)


@triton.jit
def _unpack(
    lanes_ptr, word_lo, word_hi,
    ROWS: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr, USE_PTX: tl.constexpr,
):  # fmt: skip
    """Lanes at [R, 16] pointers, scale_zero words [R] of the halves -> two weights [R, 128]."""
    a = tl.load(lanes_ptr)
    b = tl.load(lanes_ptr + 1024)
    c = tl.load(lanes_ptr + 2048)
    zero_lo = tl.broadcast_to((word_lo >> 16).to(tl.int16)[:, None], [ROWS, 16])
    zero_hi = tl.broadcast_to((word_hi >> 16).to(tl.int16)[:, None], [ROWS, 16])
    scale_lo = tl.broadcast_to(word_lo.to(tl.int16)[:, None], [ROWS, 16])
    scale_hi = tl.broadcast_to(word_hi.to(tl.int16)[:, None], [ROWS, 16])
    lo0, lo1, lo2, lo3, lo4 = _five_codes(
        a, zero_lo, zero_hi, scale_lo, scale_hi, 0, DTYPE, SCALED, USE_PTX
    )
    lo5, lo6, lo7, hi0, hi1 = _five_codes(
        b, zero_lo, zero_hi, scale_lo, scale_hi, 1, DTYPE, SCALED, USE_PTX
    )
    hi2, hi3, hi4, hi5, hi6 = _five_codes(
        c, zero_lo, zero_hi, scale_lo, scale_hi, 2, DTYPE, SCALED, USE_PTX
    )
    hi7 = _left_over_code(a, b, c, zero_hi, scale_hi, DTYPE, SCALED, USE_PTX)
    return (
        _join_slices(lo0, lo1, lo2, lo3, lo4, lo5, lo6, lo7, ROWS, DTYPE),
        _join_slices(hi0, hi1, hi2, hi3, hi4, hi5, hi6, hi7, ROWS, DTYPE),
    )


@triton.jit
def _scale_of(word, DTYPE: tl.constexpr):
    """The scale in scale_zero's words [R], as an fp32 column [R, 1]."""
    return word.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)[:, None]


@triton.jit
def _store_half(out_ptr, acc, bias_ptr, rows, tokens, M, N, HAS_BIAS: tl.constexpr):
    """acc [R, BLOCK_M] fp32 -> out [M, N], bias added before rounding."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + rows, mask=rows < N, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    where = out_ptr + tokens[None, :].to(tl.int64) * N + rows[:, None]
    mask = (tokens < M)[None, :] & (rows < N)[:, None]
    tl.store(where, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "groups_a_split"])
def w3a16_decode_kernel(
    x_ptr, lanes_ptr, scale_zero_ptr, bias_ptr, out_ptr, workspace_ptr, counter_ptr,
    M, N, K, TILES, groups_a_split,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, USE_PTX: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of 2 * ROWS outputs, splits of K, tiles of BLOCK_M tokens)."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    tile, split = tl.program_id(0), tl.program_id(1)
    group_first = split * groups_a_split
    group_last = tl.minimum(group_first + groups_a_split, K // 128)
    row = tl.arange(0, ROWS)
    unit = tile * (ROWS // 64) + row // 64  # layout tile of each row
    rows = unit * 128 + row % 64  # outputs of the lower halves; + 64 those of the upper
    unit = tl.minimum(unit, TILES - 1)  # a last half-filled tile reads what it will not store
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane_ptrs = lanes_ptr + (unit * 3072 + row % 64 * 16)[:, None] + tl.arange(0, 16)[None, :]
    rows_read = tl.minimum(tokens, M - 1)[None, :].to(tl.int64)
    x_ptrs = x_ptr + rows_read * K + tl.arange(0, 128)[:, None]
    in_range = (tokens < M)[None, :]

    acc_lo = tl.zeros([ROWS, BLOCK_M], tl.float32)
    acc_hi = tl.zeros([ROWS, BLOCK_M], tl.float32)
    for group in tl.range(group_first, group_last, num_stages=STAGES):
        words = scale_zero_ptr + group * TILES * 128 + unit * 128 + row % 64
        word_lo = tl.load(words)
        word_hi = tl.load(words + 64)
        w_lo, w_hi = _unpack(
            lane_ptrs + group * TILES * 3072, word_lo, word_hi, ROWS, DTYPE, False, USE_PTX
        )
        x = launch.load_tokens(x_ptrs + group * 128, in_range, BLOCK_M)  # [128, BLOCK_M]
        acc_lo += tl.dot(w_lo, x) * _scale_of(word_lo, DTYPE)
        acc_hi += tl.dot(w_hi, x) * _scale_of(word_hi, DTYPE)

    if SPLIT:
        splits = tl.num_programs(1)
        column = tl.arange(0, BLOCK_M)
        inside = column[None, :] * (2 * ROWS) + row[:, None]  # of a partial tile [BLOCK_M, 2 ROWS]
        output_tile = tl.program_id(2) * tl.num_programs(0) + tile
        partials = workspace_ptr + output_tile.to(tl.int64) * splits * (2 * ROWS * BLOCK_M) + inside
        mine = partials + split * (2 * ROWS * BLOCK_M)
        tl.store(mine, acc_lo, mask=in_range)
        tl.store(mine + ROWS, acc_hi, mask=in_range)
        tl.debug_barrier()  # all of this program's stores before the counter says so
        arrived = tl.atomic_add(counter_ptr + output_tile, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            acc_lo = tl.zeros([ROWS, BLOCK_M], tl.float32)
            acc_hi = tl.zeros([ROWS, BLOCK_M], tl.float32)
            # In order: the sum is the same whoever adds it. Unrolled, so that loads overlap.
            for i in tl.range(0, splits, loop_unroll_factor=4):
                there = partials + i * (2 * ROWS * BLOCK_M)
                acc_lo += tl.load(there, mask=in_range, other=0.0, cache_modifier=".cg")
                acc_hi += tl.load(there + ROWS, mask=in_range, other=0.0, cache_modifier=".cg")
            tl.store(counter_ptr + output_tile, 0)  # ready for the next launch
            _store_half(out_ptr, acc_lo, bias_ptr, rows, tokens, M, N, HAS_BIAS)
            _store_half(out_ptr, acc_hi, bias_ptr, rows + 64, tokens, M, N, HAS_BIAS)
    else:
        _store_half(out_ptr, acc_lo, bias_ptr, rows, tokens, M, N, HAS_BIAS)
        _store_half(out_ptr, acc_hi, bias_ptr, rows + 64, tokens, M, N, HAS_BIAS)


@triton.jit(do_not_specialize=["M"])
def w3a16_prefill_kernel(
    x_ptr, lanes_ptr, scale_zero_ptr, bias_ptr, out_ptr,
    M, N, K, TILES,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, USE_PTX: tl.constexpr,
):  # fmt: skip
    """Grid (output tiles of 2 * ROWS x BLOCK_M,), GROUP_M token tiles beside each other for L2."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(TILES * 64, ROWS)
    tile_m, tile = launch.grouped(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    row = tl.arange(0, ROWS)
    unit = tile * (ROWS // 64) + row // 64
    rows = unit * 128 + row % 64
    unit = tl.minimum(unit, TILES - 1)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    lane_ptrs = lanes_ptr + (unit * 3072 + row % 64 * 16)[:, None] + tl.arange(0, 16)[None, :]
    rows_read = tl.minimum(tokens, M - 1)[None, :].to(tl.int64)
    x_ptrs = x_ptr + rows_read * K + tl.arange(0, 128)[:, None]
    in_range = (tokens < M)[None, :]

    acc_lo = tl.zeros([ROWS, BLOCK_M], tl.float32)
    acc_hi = tl.zeros([ROWS, BLOCK_M], tl.float32)
    for group in tl.range(0, K // 128, num_stages=STAGES):
        words = scale_zero_ptr + group * TILES * 128 + unit * 128 + row % 64
        w_lo, w_hi = _unpack(
            lane_ptrs + group * TILES * 3072, tl.load(words), tl.load(words + 64),
            ROWS, DTYPE, True, USE_PTX,
        )  # fmt: skip
        x = launch.load_tokens(x_ptrs + group * 128, in_range, BLOCK_M)
        acc_lo = tl.dot(w_lo, x, acc_lo)
        acc_hi = tl.dot(w_hi, x, acc_hi)
    _store_half(out_ptr, acc_lo, bias_ptr, rows, tokens, M, N, HAS_BIAS)
    _store_half(out_ptr, acc_hi, bias_ptr, rows + 64, tokens, M, N, HAS_BIAS)


@triton.jit
def w3a16_dequantize_kernel(
    lanes_ptr, scale_zero_ptr, weight_ptr, N, K, TILES, USE_PTX: tl.constexpr
):
    """Grid (tiles of 128 outputs, groups): weight [N, K], rounded as the prefill kernel rounds."""
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    tile, group = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, 64)
    rows = tile * 128 + row
    lane_ptrs = lanes_ptr + (group * TILES + tile) * 3072
    lane_ptrs += row[:, None] * 16 + tl.arange(0, 16)[None, :]
    words = scale_zero_ptr + group * TILES * 128 + rows
    w_lo, w_hi = _unpack(lane_ptrs, tl.load(words), tl.load(words + 64), 64, DTYPE, True, USE_PTX)
    where = weight_ptr + rows[:, None].to(tl.int64) * K + group * 128 + tl.arange(0, 128)[None, :]
    tl.store(where, w_lo, mask=(rows < N)[:, None])
    tl.store(where + 64 * K, w_hi, mask=(rows + 64 < N)[:, None])


def linear(
    x: torch.Tensor,
    lanes: torch.Tensor,
    scale_zero: torch.Tensor,
    counters: torch.Tensor,
    workspace: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    tile: Tile,
    use_ptx: bool = True,
) -> torch.Tensor:
    """x [M, K] contiguous, layout.repack_w3a16's tensors, bias [N] or None -> [M, N] of x's dtype.

    counters: int32 zeros, one an output tile (launch.counters); left at zero. workspace: int32
    scratch of launch.workspace_size(tile). use_ptx=False takes the pure Triton twin.
    """
    m, k = x.shape
    tiles = lanes.shape[1]
    if tile.regime == "dequantize":
        weight = dequantize(lanes, scale_zero, n, x.dtype, use_ptx)
        return torch.nn.functional.linear(x, weight, bias)
    rows = tile.block_n // 2
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    tiles_n = triton.cdiv(tiles * 64, rows)
    shape = dict(BLOCK_M=tile.block_m, ROWS=rows, STAGES=tile.num_stages)
    options = dict(HAS_BIAS=bias is not None, USE_PTX=use_ptx, **launch.options(tile))
    if tile.regime == "prefill":
        grid = (triton.cdiv(m, tile.block_m) * tiles_n,)
        w3a16_prefill_kernel[grid](
            x, lanes, scale_zero, bias, out, m, n, k, tiles,
            GROUP_M=tile.group_m, **shape, **options,
        )  # fmt: skip
        return out
    tiles_m = triton.cdiv(m, tile.block_m)
    splits, a_split = launch.split_k(tile, tiles_n * tiles_m, k // 128, x.device)
    partials = launch.partial_sums(workspace, splits, tiles_n * tiles_m, tile, torch.float32)
    w3a16_decode_kernel[(tiles_n, splits, tiles_m)](
        x, lanes, scale_zero, bias, out, partials, counters, m, n, k, tiles, a_split,
        SPLIT=splits > 1, **shape, **options,
    )  # fmt: skip
    return out


def dequantize(
    lanes: torch.Tensor, scale_zero: torch.Tensor, n: int, dtype: torch.dtype, use_ptx: bool = True
) -> torch.Tensor:
    """The weight [N, K], rounded to `dtype`."""
    groups, tiles = lanes.shape[:2]
    weight = torch.empty(n, groups * 128, dtype=dtype, device=lanes.device)
    w3a16_dequantize_kernel[(tiles, groups)](
        lanes, scale_zero, weight, n, groups * 128, tiles, USE_PTX=use_ptx
    )
    return weight
