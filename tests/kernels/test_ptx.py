"""The inline PTX, executed by a small emulator: exact for every code and zero point.

No GPU runs in most test environments, and the interpreter takes the pure Triton twin; these eight
opcodes are all that the PTX uses, so it can be checked all the same.
"""

from __future__ import annotations

import re

import pytest
import torch

from qig_serve.kernels import halves, three_bits, w4a8

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


def planes_of(codes: list[int]) -> tuple[int, int, int]:
    """Bytes A, B, C of eight codes, as halves.py draws them."""
    c = codes
    return (
        c[0] | c[4] << 3 | (c[3] & 3) << 6,
        c[1] | c[5] << 3 | (c[7] & 3) << 6,
        c[2] | c[6] << 3 | (c[3] >> 2) << 6 | (c[7] >> 2) << 7,
    )


def registers(byte_codes: list[list[int]]) -> list[int]:
    """Three registers of four bytes: of four positions with eight codes each."""
    bytes_ = [planes_of(codes) for codes in byte_codes]
    return [sum(b[plane] << 8 * i for i, b in enumerate(bytes_)) for plane in range(3)]


def pair(low: int, high: int) -> int:
    return low | high << 16


def floats(register: int, dtype: torch.dtype) -> list[float]:
    halves_ = torch.tensor([register & 0xFFFF, register >> 16]).to(torch.uint16)
    return halves_.view(dtype).tolist()


def some_codes(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 8, (4, 8), generator=generator).tolist()


@pytest.mark.parametrize("float_type", DTYPES)
@pytest.mark.parametrize("half", [0, 1])
def test_every_code_and_zero_point_as_numbers(half: int, float_type: str) -> None:
    dtype = DTYPES[float_type]
    ptx = three_bits.half_group_ptx(half, float_type)
    scale = torch.tensor([0.0123]).to(dtype)
    bits = int(scale.view(torch.uint16))
    seen = set()
    for seed in range(12):
        codes = some_codes(seed)
        for zero in range(8):
            inputs = [*registers(codes), pair(zero, zero), pair(bits, bits)]
            out = execute(ptx, 8, inputs)
            for i in range(4):
                for register, positions in ((out[2 * i], (0, 2)), (out[2 * i + 1], (1, 3))):
                    wanted = [codes[p][4 * half + i] - zero for p in positions]
                    seen |= {(i, w) for w in wanted}
                    expected = torch.tensor(wanted).to(dtype) * scale
                    assert floats(register, dtype) == expected.tolist()
    assert seen == {(i, w) for i in range(4) for w in range(-7, 8)}


def test_every_code_as_a_byte() -> None:
    for seed in range(64):
        codes = some_codes(seed)
        out = execute(halves.PLANES_PTX.value, 8, registers(codes))
        for j, register in enumerate(out):
            assert [register >> 8 * i & 255 for i in range(4)] == [8 * c[j] for c in codes]


def test_every_byte_of_the_4_bit_weights() -> None:
    for byte in range(256):
        word = byte | (byte ^ 0x5A) << 8 | (255 - byte) << 16 | byte << 24
        low, high = execute(w4a8.UNPACK_PTX.value, 2, [word])
        for i in range(4):
            source = word >> 8 * i & 255
            for register, nibble in ((low, source & 15), (high, source >> 4)):
                got = (register >> 8 * i & 255 ^ 128) - 128
                assert got == 16 * ((nibble ^ 8) - 8)
