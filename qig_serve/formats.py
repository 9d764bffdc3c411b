"""The quantization schemes and the tensors that each one stores: the one definition.

Offline code writes these tensors, the kernels and the vLLM plugin read them. Imports nothing
heavy, so that the plugin can be registered in every vLLM process at no cost.

On disk a quantized linear `P.weight` of shape [N, K] (out, in) is replaced by

    w3a16   P.weight_packed      int32 [N, K * 3 / 32]
            P.weight_scale       model dtype [N, ceil(K / 128)]
            P.weight_zero_point  uint8 [N, ceil(K / 128)]
    w4a8    P.weight_packed      int32 [N, K / 8]
            P.weight_scale       float32 [N, 1]
    w8a16   P.weight_packed      int32 [N, K / 4]
            P.weight_scale       float32 [N, 1]

32 divides K. Where 128 does not, the last group of w3a16 is shorter.

w8a16 is what the output head and the embedding may be stored in, N the entries of the vocabulary;
a tied model stores the embedding alone.

`bits`-wide codes lie densely along K, least significant bit first: code k of a row occupies bits
`bits * k` to `bits * k + bits - 1` of the row read as one little-endian bit string. So 32 3-bit
codes fill exactly three words, and 8 4-bit codes one. Symmetric codes are two's complement.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

FORMAT_VERSION = 1
QUANT_METHOD = "qig"

GROUP_SIZE = 128
"""Inputs that share a scale, in the schemes that have groups; of a row's last group fewer may."""
WORD_INPUTS = 32
"""Inputs whose codes fill whole words, of any number of bits: K is a multiple."""


@dataclass(frozen=True)
class QuantScheme:
    """How weights and activations are quantized. All sizes count elements along K (input)."""

    name: str
    bits: int
    """Bits of a weight code."""
    symmetric: bool
    """True: signed codes, no zero point. False: unsigned codes with an integer zero point."""
    group_size: int | None
    """Inputs that share a scale; None means one scale per output channel."""
    activation_bits: int | None = None
    """8: activations are int8, symmetric, one scale per token. None: left in 16 bits."""
    servable: bool = True
    """False for what decoder linears are not served in: stress schemes, which exist only to compare
    methods, and the vocabulary's w8a16."""

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def packed_factor(self) -> Fraction:
        """Codes per int32 word: 32/3 for 3 bits, 8 for 4 bits."""
        return Fraction(32, self.bits)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What the names of the tensors that replace a linear's weight end in."""
        return tuple(tensor_specs(self, 1, WORD_INPUTS))

    @property
    def cut_multiple(self) -> int:
        """Each part of K must be a multiple of this where tensor parallelism cuts K."""
        return self.group_size or WORD_INPUTS

    def num_groups(self, k: int) -> int:
        """Scales a row of K inputs has."""
        return 1 if self.group_size is None else -(-k // self.group_size)


SCHEMES: dict[str, QuantScheme] = {
    s.name: s
    for s in (
        QuantScheme("w3a16", bits=3, symmetric=False, group_size=GROUP_SIZE),
        QuantScheme("w4a8", bits=4, symmetric=True, group_size=None, activation_bits=8),
        QuantScheme("w8a16", bits=8, symmetric=True, group_size=None, servable=False),
        # For comparing methods where the served schemes are too mild to distinguish them.
        QuantScheme("w2a16", bits=2, symmetric=False, group_size=GROUP_SIZE, servable=False),
        QuantScheme("w2a16-channel", bits=2, symmetric=False, group_size=None, servable=False),
    )
}


VOCABULARY_SCHEME = SCHEMES["w8a16"]
"""Of the output head and of the embedding, where they are not left in 16 bits."""


def get_scheme(name: str) -> QuantScheme:
    """The scheme of that name; ValueError with the known names otherwise."""
    try:
        return SCHEMES[name]
    except KeyError:
        known = ", ".join(s.name for s in SCHEMES.values() if s.servable)
        raise ValueError(f"unknown scheme {name!r}: choose one of {known}") from None


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored tensor. `dtype` is a torch dtype's name or "model"."""

    shape: tuple[int, ...]
    dtype: Literal["int32", "uint8", "float32", "model"]


def tensor_specs(scheme: QuantScheme, n: int, k: int) -> dict[str, TensorSpec]:
    """What replaces a linear weight [N, K]: suffix -> spec. ValueError when K does not divide."""
    if reason := unsupported_shape(scheme, n, k):
        raise ValueError(reason)
    groups = scheme.num_groups(k)
    specs = {"weight_packed": TensorSpec((n, k * scheme.bits // 32), "int32")}
    per_group = scheme.group_size is not None
    specs["weight_scale"] = TensorSpec((n, groups), "model" if per_group else "float32")
    if not scheme.symmetric:
        specs["weight_zero_point"] = TensorSpec((n, groups), "uint8")
    return specs


def unsupported_shape(scheme: QuantScheme, n: int, k: int) -> str | None:
    """Why a linear of N outputs and K inputs cannot be stored in the scheme, or None."""
    if n <= 0 or k <= 0:
        return f"{scheme.name} needs positive sizes, got N={n}, K={k}"
    if k % WORD_INPUTS:
        return f"{scheme.name} needs an input size that {WORD_INPUTS} divides, got K={k}"
    return None


def group_inputs(k: int, groups: int) -> int:
    """Inputs per group, of a row of K inputs in `groups` groups.

    GROUP_SIZE where that makes so many, the last one perhaps shorter; equal parts otherwise.
    """
    size = min(GROUP_SIZE, k)
    return size if -(-k // size) == groups else k // groups
