"""The inline PTX, executed by a small emulator: exact for every code and zero point.

No GPU runs in most test environments, and the interpreter takes the pure Triton twin; these eight
opcodes are all that the PTX uses, so it can be checked all the same.
"""

from __future__ import annotations

import re

import pytest
import torch

from qig_serve.kernels import w3a16, w4a8

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def lop3(a: int, b: int, c: int, table: int) -> int:
    out = 0
    for i in range(8):
        if table >> i & 1:
            term = 0xFFFFFFFF
            for operand, position in ((a, 2), (b, 1), (c, 0)):
                term &= operand if i >> position & 1 else ~operand
            out |= term
    return out & 0xFFFFFFFF


def fused(a: int, b: int, c: int, dtype: torch.dtype) -> int:
    halves = []
    for shift in (0, 16):
        bits = torch.tensor([v >> shift & 0xFFFF for v in (a, b, c)]).to(torch.uint16)
        x, y, z = bits.view(dtype).double()
        halves.append(int((x * y + z).to(dtype).view(torch.uint16)))
    return halves[0] | halves[1] << 16


def execute(ptx: str, outputs: int, inputs: list[int]) -> list[int]:
    """The output registers of an inline assembly block; every opcode it may use is here."""
    values = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def read(operand: str) -> int:
        return values[operand] if operand in values else int(operand, 0)

    for statement in ptx.replace("{", "").replace("}", "").split(";"):
        if not (text := statement.strip()) or text.startswith(".reg"):
            continue
        name, _, rest = text.partition(" ")
        target, *operands = re.split(r",\s*", rest)
        args = [read(operand) for operand in operands]
        if name == "mov.b32":
            out = args[0]
        elif name == "shr.u32":
            out = args[0] >> args[1]
        elif name == "shl.b32":
            out = args[0] << args[1]
        elif name == "and.b32":
            out = args[0] & args[1]
        elif name == "mad.lo.u32":
            out = args[0] * args[1] + args[2]
        elif name == "lop3.b32":
            out = lop3(*args)
        elif match := re.fullmatch(r"fma\.rn\.(bf|f)16x2", name):
            out = fused(*args, torch.bfloat16 if match[1] == "bf" else torch.float16)
        else:
            raise AssertionError(f"opcode {name} is not emulated")
        values[target] = out & 0xFFFFFFFF
    return [values[f"${i}"] for i in range(outputs)]


def lane_word(fields: list[int], left_over: int) -> int:
    return sum(code << 3 * i for i, code in enumerate(fields)) | left_over << 15


def pair(low: int, high: int) -> int:
    return low | high << 16


def floats(register: int, dtype: torch.dtype) -> list[float]:
    halves = torch.tensor([register & 0xFFFF, register >> 16]).to(torch.uint16)
    return halves.view(dtype).tolist()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("float_type", DTYPES)
@pytest.mark.parametrize("lane", [0, 1, 2])
def test_every_code_and_zero_point_of_a_lane(lane: int, float_type: str, scaled: bool) -> None:
    dtype = DTYPES[float_type]
    ptx = w3a16.lane_ptx(lane, float_type, scaled)
    scales = torch.tensor([0.0123, 0.77]).to(dtype)
    scale_bits = [int(bits) for bits in scales.view(torch.uint16)]
    for zero in range(8):
        zeros = [zero, 7 - zero]  # of the lower and the upper half
        for code in range(8):
            low = [(code + i) % 8 for i in range(5)]
            high = [(code * 3 + 2 * i) % 8 for i in range(5)]
            word = pair(lane_word(low, code & 1), lane_word(high, ~code & 1))
            inputs = [word, *(pair(z, z) for z in zeros)]
            if scaled:
                inputs += [pair(bits, bits) for bits in scale_bits]
            for i, register in enumerate(execute(ptx, 5, inputs)):
                half = int(5 * lane + i >= 8)
                expected = torch.tensor([low[i] - zeros[half], high[i] - zeros[half]]).to(dtype)
                if scaled:
                    expected = expected * scales[half]
                assert floats(register, dtype) == expected.tolist()


@pytest.mark.parametrize("float_type", DTYPES)
def test_every_left_over_code(float_type: str) -> None:
    dtype = DTYPES[float_type]
    ptx = w3a16.left_over_ptx(float_type, False)
    noise = [5, 2, 7, 0, 3]
    for code in range(8):
        other = 7 - code
        lanes = [
            pair(lane_word(noise, code >> i & 1), lane_word(noise[::-1], other >> i & 1))
            for i in range(3)
        ]
        for zero in range(8):
            (register,) = execute(ptx, 1, [*lanes, pair(zero, zero)])
            assert floats(register, dtype) == [code - zero, other - zero]


def test_every_byte_of_the_4_bit_weights() -> None:
    for byte in range(256):
        word = byte | (byte ^ 0x5A) << 8 | (255 - byte) << 16 | byte << 24
        low, high = execute(w4a8.UNPACK_PTX.value, 2, [word])
        for i in range(4):
            source = word >> 8 * i & 255
            for register, nibble in ((low, source & 15), (high, source >> 4)):
                got = (register >> 8 * i & 255 ^ 128) - 128
                assert got == 16 * ((nibble ^ 8) - 8)
