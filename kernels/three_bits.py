"""3-bit codes of a half group made 16-bit numbers: (code - zero) * scale, rounded once.

From a field to a number, in one instruction: `(w & 7 << p) | magic`, a lop3, writes the field at
bits p..p+2 into the mantissa of a float that has nothing else there. In bf16, 0x4300 is 128 and
its last mantissa bit is worth 1, so p = 0 gives 128 + v; 0x4180 is 16 with a last bit worth 1/8,
so p = 3, without a shift, gives 16 + v. In general magic is 2^(b-p), b = 7 mantissa bits in bf16
and 10 in fp16. A register has four bytes: of bytes 0 and 2 that makes two numbers at once, and
after one shift by 8 of bytes 1 and 3. One packed addition takes 2^(b-p) + zero away, exactly, and
one packed multiplication scales: what reaches the tensor core is the weight, rounded once to 16
bits.

Operations for the 32 weights in the three registers of four byte positions:

    shifts by 8                                  8      0.25 per weight
    lop3: 16 fields, 2 to gather c3 and c7      18      0.56
    shifts to gather c3 and c7                   4      0.13
    packed additions, multiplications           32     (1.00, not on the integer pipe)
"""

from __future__ import annotations

import triton
import triton.language as tl

_MANTISSA = {"bf16": 7, "fp16": 10}
_BIAS = {"bf16": 127, "fp16": 15}
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
def _number(out: str, word: str, p: int, float_type: str) -> str:
    """PTX: out = ((field of word at p, in both halves) - zero) * scale."""
    two = f"{float_type.replace('fp', 'f')}x2"
    return f"""lop3.b32 {out}, {word}, {_twice(7 << p)}, {_twice(_magic(float_type, p))}, {_AND_OR};
    fma.rn.{two} {out}, {out}, one, minus_{p};
    fma.rn.{two} {out}, {out}, $12, minus_zero;"""


@triton.constexpr_function
def half_group_ptx(half: int, float_type: str) -> str:
    """PTX of half a group: c0..c3 (half 0) or c4..c7 of two pairs of bytes, which are two elements.

    $0-$7 out: of each code the even bytes' numbers, then the odd bytes'; $8 $9 $10 planes A, B, C;
    $11 zero points; $12 scales. Two elements to a register everywhere, and neither sees the other:
    which two come together is the compiler's choice.
    """
    one = _BIAS[float_type] << _MANTISSA[float_type]
    p = 3 * half
    lines = []
    for i in range(4):
        if i < 3:
            lines.append(f"mov.b32 t, ${8 + i};")
        else:  # c3 from planes A and C, c7 from B and C: gathered at bits 3-5
            lines.append(f"shr.u32 t, ${8 + half}, 3; shr.u32 u, $10, {1 + half};")
            lines.append(f"lop3.b32 t, t, u, 0x18181818, {_BLEND};")
            p = 3
        lines.append(_number(f"${2 * i}", "t", p, float_type))
        lines.append("shr.u32 t, t, 8;")
        lines.append(_number(f"${2 * i + 1}", "t", p, float_type))
    for q in sorted({3 * half, 3}):
        magic = _twice(0x8000 | _magic(float_type, q))
        lines.insert(0, f"mad.lo.u32 minus_{q}, $11, {1 << q}, {magic};")
    body = "\n".join(lines)
    return f"""{{ .reg .b32 t, u, one, minus_0, minus_3, minus_zero;
    mov.b32 one, {_twice(one)};
    mov.b32 minus_zero, {_twice(0x8000)};
    {body}
    }}"""


@triton.constexpr_function
def _float_type(dtype: tl.dtype) -> str:
    return dtype.name  # "bf16" or "fp16"


@triton.jit
def _codes(word, zero, scale, DTYPE: tl.constexpr):
    """Twin of _number: (word & 7 - zero) * scale, rounded once, as DTYPE's bits."""
    value = ((word & 7) - zero.to(tl.int32)).to(tl.float32)
    value = value * scale.to(DTYPE, bitcast=True).to(tl.float32)
    return value.to(DTYPE).to(tl.int16, bitcast=True)


@triton.jit
def _four_slices(
    a, b, c, zero, scale, HALF: tl.constexpr, DTYPE: tl.constexpr, USE_PTX: tl.constexpr
):  # fmt: skip
    """Pairs of bytes of the planes, zero points and scales, all int16 [R, 8] -> numbers.

    DTYPE's bits, int16 [R, 8] each: of four slices the even bytes', and the odd bytes'.
    """
    if USE_PTX:
        ptx: tl.constexpr = half_group_ptx(HALF, _float_type(DTYPE))
        return tl.inline_asm_elementwise(
            ptx, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r", [a, b, c, zero, scale],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        a, b, c = a.to(tl.int32), b.to(tl.int32), c.to(tl.int32)
        low = b if HALF else a
        gathered = (low >> 6) & 0x303 | (c >> (6 + HALF) & 0x101) << 2
        a, b, c = a >> 3 * HALF, b >> 3 * HALF, c >> 3 * HALF
        return (
            _codes(a, zero, scale, DTYPE), _codes(a >> 8, zero, scale, DTYPE),
            _codes(b, zero, scale, DTYPE), _codes(b >> 8, zero, scale, DTYPE),
            _codes(c, zero, scale, DTYPE), _codes(c >> 8, zero, scale, DTYPE),
            _codes(gathered, zero, scale, DTYPE), _codes(gathered >> 8, zero, scale, DTYPE),
        )  # fmt: skip


@triton.jit
def _in_order(e0, o0, e1, o1, e2, o2, e3, o3, R: tl.constexpr, ORDER: tl.constexpr):
    """Even and odd bytes of four slices, [R, 8] each -> [R, 64] in the order of k (layout.py).

    Names on a GPU, no instruction.
    """
    first = tl.join(tl.join(e0, o0), tl.join(e2, o2))  # [R, pair, odd, s / 2]
    second = tl.join(tl.join(e1, o1), tl.join(e3, o3))
    every = tl.join(first, second).reshape(R, 4, 2, 2, 2, 2)  # [.., odd, s / 2, s % 2]
    if ORDER == 16:
        ordered = every.permute(0, 4, 5, 3, 1, 2)
    else:
        ordered = every.permute(0, 4, 1, 5, 3, 2)
    return ordered.reshape(R, 64)


@triton.jit
def half_group(
    a, b, c, scale_zero, HALF: tl.constexpr, BLOCK_N: tl.constexpr, ORDER: tl.constexpr,
    DTYPE: tl.constexpr, USE_PTX: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_N, 64] of DTYPE: planes int16 [BLOCK_N, 8], scale_zero int32 [BLOCK_N]."""
    zero = tl.broadcast_to((scale_zero & 7).to(tl.int16)[:, None], [BLOCK_N, 8])
    scale = (scale_zero & -8).to(tl.float32, bitcast=True).to(DTYPE).to(tl.int16, bitcast=True)
    scale = tl.broadcast_to(scale[:, None], [BLOCK_N, 8])
    e0, o0, e1, o1, e2, o2, e3, o3 = _four_slices(a, b, c, zero, scale, HALF, DTYPE, USE_PTX)
    return _in_order(e0, o0, e1, o1, e2, o2, e3, o3, BLOCK_N, ORDER).to(DTYPE, bitcast=True)
