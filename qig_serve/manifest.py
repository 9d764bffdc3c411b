"""What a qig checkpoint says about itself: `quantization_config` in config.json.

Read from outside, so validated strictly: an unknown field, or a version from the future, is
an error and not a guess.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qig_serve.errors import UserError
from qig_serve.formats import FORMAT_VERSION, SCHEMES, QuantScheme

HEAD, EMBEDDING = "lm_head", "embed_tokens"
"""Last words of the names of output head and embedding, in every family."""
PER_BLOCK = "embed_tokens_per_layer"
"""A second embedding, whose rows have a part for each decoder block (Gemma 4 E2B, E4B)."""


class CalibrationInfo(BaseModel):
    """What the checkpoint was calibrated on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    samples: int = Field(ge=0)
    sha256: str
    seed: int


class QuantizationConfig(BaseModel):
    """`quantization_config` of config.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: Literal["qig"]
    format_version: int
    scheme: str
    bits: int
    group_size: int | None
    ignore: list[str]
    """Modules left in 16 bits: names in the checkpoint, matched as dotted prefixes."""
    eight_bit: list[str] = Field(default_factory=list)
    """Output head and embedding, where their weights are stored in formats.VOCABULARY_SCHEME: names
    in the checkpoint. A tied model has the embedding alone here, and no tensor of the head."""
    model_type: str = ""
    architectures: list[str] = Field(default_factory=list)
    """Those of config.json when it was quantized, so that another one beside the tensors is seen;
    empty means unknown."""
    method: str = "rtn"
    produced_by: str = ""
    """Not "producer": vLLM takes that for ModelOpt's and expects an object."""
    calibration: CalibrationInfo | None = None
    tensor_parallel_sizes: list[int] = Field(default_factory=lambda: [1])
    recipe: dict[str, Any] = Field(default_factory=dict)
    summary: dict[str, Any] = Field(default_factory=dict)
    """Figures for people: loss, recovery. Nothing is computed from them."""

    @model_validator(mode="after")
    def _consistent(self) -> QuantizationConfig:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version {self.format_version} is not supported by this qig-serve, which "
                f"reads version {FORMAT_VERSION}: upgrade qig-serve, or quantize again"
            )
        if self.scheme not in SCHEMES or not SCHEMES[self.scheme].servable:
            known = ", ".join(s.name for s in SCHEMES.values() if s.servable)
            raise ValueError(f"unknown scheme {self.scheme!r}: choose one of {known}")
        expected = SCHEMES[self.scheme]
        if (self.bits, self.group_size) != (expected.bits, expected.group_size):
            raise ValueError(
                f"scheme {self.scheme} has bits={expected.bits}, group_size={expected.group_size}, "
                f"but the checkpoint says bits={self.bits}, group_size={self.group_size}"
            )
        return self

    @model_validator(mode="after")
    def _eight_bit_is_vocabulary(self) -> QuantizationConfig:
        for name in self.eight_bit:
            if not name.endswith((HEAD, EMBEDDING, PER_BLOCK)) or self.is_ignored(name):
                raise ValueError(
                    f"eight_bit names {name!r}, which is no {HEAD}, {EMBEDDING} or {PER_BLOCK}, or "
                    "is listed as left in 16 bits, too"
                )
        return self

    def to_json(self) -> dict[str, Any]:
        """As config.json has it; without `eight_bit` where nothing is, for older readers."""
        return self.model_dump(mode="json", exclude=None if self.eight_bit else {"eight_bit"})

    @property
    def eight_bit_embedding(self) -> str | None:
        """The embedding in 8 bits; None where it is in 16."""
        return next((name for name in self.eight_bit if name.endswith(EMBEDDING)), None)

    @property
    def eight_bit_per_block(self) -> str | None:
        """The embedding with a part for each block in 8 bits; None where it is in 16."""
        return next((name for name in self.eight_bit if name.endswith(PER_BLOCK)), None)

    @property
    def eight_bit_head(self) -> str | None:
        """The output head in 8 bits with tensors of its own; None where it is tied or in 16."""
        return next((name for name in self.eight_bit if name.endswith(HEAD)), None)

    @property
    def eight_bit_is_tied(self) -> bool:
        """Whether the embedding in 8 bits is the output head, too."""
        heads = [name for name in (*self.ignore, *self.eight_bit) if name.endswith(HEAD)]
        return self.eight_bit_embedding is not None and not heads

    @property
    def quant_scheme(self) -> QuantScheme:
        """The scheme of the weights."""
        return SCHEMES[self.scheme]

    @property
    def is_equalized(self) -> bool:
        """Whether channels were rescaled, so that activations are not the source model's.

        True where the checkpoint does not say.
        """
        unsaid = "none" if self.method in ("rtn", "gptq") else "unknown"
        return bool(self.recipe.get("equalize", unsaid) != "none")

    def is_ignored(self, module: str) -> bool:
        """Whether a module (checkpoint name) is left in 16 bits."""
        return any(module == name or module.startswith(name + ".") for name in self.ignore)


def read_quantization_config(config: dict[str, Any], where: str) -> QuantizationConfig:
    """Validate `quantization_config`; UserError with one sentence that names `where`."""
    try:
        return QuantizationConfig.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "this qig-serve does not know it: upgrade qig-serve, or quantize again"
        raise UserError(
            f"{where}: quantization_config{'.' + place if place else ''}: {message}"
        ) from None
