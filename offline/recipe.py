"""QuantRecipe: every choice of a quantization run. One model for YAML, command line and Python.

A method is a set of defaults; values set explicitly win over them.
What a part of the run needs of the recipe it gets as a small dataclass of its own: TokenWeighting,
Equalization, Rounding. Imports no torch: the command line's flags are made of the fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qig_serve.errors import UserError
from qig_serve.formats import SCHEMES, QuantScheme, get_scheme
from qig_serve.offline.calibration.sources import CAPTIONS
from qig_serve.text_files import read_text


@dataclass(frozen=True)
class Damping:
    """How the Hessian of a method that compensates errors is damped."""

    fraction: float = 0.01
    """What is added to the diagonal, as a fraction of `by`."""
    by: Literal["column", "mean"] = "column"
    """"column": of each entry itself, which does not see the scale of inputs; "mean": of the
    diagonal's mean, as in GPTQ."""
    validated: bool = False
    """Whether `fraction` is the least, and as many times more is added as lowers the error on
    samples left out: for rounding that has two halves of them (`shifted`). Equalization's noise
    model takes the least."""


@dataclass(frozen=True)
class Rounding:
    """A rounding method: a file in offline/rounding/ and what it needs."""

    module: str
    """The file, which has the method's `round_weight`."""
    statistics: bool = True
    """Whether it looks at the inputs of a linear, or only at its weight."""
    weighted: bool = False
    """Whether token weights weigh those statistics; otherwise all tokens count alike."""
    shifted: bool = False
    """Whether it needs full-precision inputs beside those of the quantized prefix, in two halves
    of the samples."""
    outputs: bool = False
    """Whether it needs to know what errors of a linear's outputs cost the answers."""
    damping: Damping | None = None
    """Of a method that compensates errors; None for one that does not."""


# Add a method: its file, and a row here.
ROUNDINGS: dict[str, Rounding] = {
    "nearest": Rounding("nearest", statistics=False),
    "clip": Rounding("clip", weighted=True),
    "gptq": Rounding("gptq", damping=Damping(by="mean")),
    "gptq-weighted": Rounding("gptq", damping=Damping(by="mean"), weighted=True),
    "qronos": Rounding("qronos", damping=Damping(validated=True), shifted=True),
    "qronos-outputs": Rounding(
        "qronos", damping=Damping(validated=True), shifted=True, outputs=True
    ),
}

# What a method means, as values of the fields below.
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"equalize": "none", "token_weights": "uniform"},
    "awq": {"equalize": "search", "token_weights": "uniform"},
    "awq-clip": {"equalize": "search", "token_weights": "uniform", "rounding": "clip"},
    "mbq": {"equalize": "search", "token_weights": "modality"},
    "qig": {"equalize": "search", "token_weights": "qig"},
    "smoothquant": {"equalize": "smoothquant", "token_weights": "uniform"},
    "gptq": {"equalize": "none", "token_weights": "uniform", "rounding": "gptq"},
    "gptq-qig": {"equalize": "none", "token_weights": "qig", "rounding": "gptq-weighted"},
    "qig+": {
        "equalize": "channels",
        "token_weights": "qig",
        "steps": 2,
        "rounding": "qronos-outputs",
    },
}


if TYPE_CHECKING:
    Method = str
    RoundingName = str
else:  # the tables' keys: a row is enough
    Method = Literal[tuple(METHODS)]
    RoundingName = Literal[tuple(ROUNDINGS)]
TokenWeightSource = Literal["uniform", "modality", "gradient", "attention", "perturbation", "qig"]
EqualizeKind = Literal["channels", "search", "smoothquant", "none"]


@dataclass(frozen=True)
class TokenWeighting:
    """How tokens are weighted in a search: the recipe's fields of these names."""

    source: TokenWeightSource
    iqr: bool
    baseline: Literal["zero", "quantized"]
    quadrature: Literal["gauss", "uniform"]
    steps: int

    @property
    def needs_quantized_input(self) -> bool:
        """Whether it looks at what the quantized prefix gives in place of a module's input."""
        return self.source == "qig" and self.baseline == "quantized"


@dataclass(frozen=True)
class Equalization:
    """How equalization scales are chosen: the recipe's fields of these names."""

    kind: EqualizeKind
    grid: int
    weighting: TokenWeighting
    compensation: Damping | None
    """Of the rounding that follows; None if it compensates nothing."""


EXECUTION_FIELDS = frozenset({"device", "offload", "allow_fallbacks"})
"""Fields that say where a run happens and when it fails, and not what it computes."""


class QuantRecipe(BaseModel):
    """The settings of one run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: str = Field(
        default="w3a16",
        description="; ".join(
            f"{s.name}: {s.bits}-bit weights, {s.activation_bits or 16}-bit activations"
            for s in SCHEMES.values()
            if s.servable
        ),
    )
    format: Literal["qig", "compressed-tensors"] = Field(
        default="qig",
        description="form of the checkpoint; compressed-tensors: the same numbers for vLLM as it "
        "comes, 3-bit codes in 4 bits",
    )
    method: Method = Field(
        default="qig+",
        description="a set of defaults for token weights, equalization and rounding; qig is the "
        "paper's, qig+ ours",
    )

    calib: str = Field(
        default=CAPTIONS,
        description="calibration data: a JSON or JSONL file of our form or of LLaVA's, "
        "LLaMA-Factory's, TRL's or The Cauldron's, a CSV or parquet file with columns image and "
        "caption (or question and answer; parquet: those forms too), a folder of captioned "
        "images, hf:NAME?split=train&image=COLUMN&question=COLUMN&answer=COLUMN, or 'demo'",
    )
    image_folder: str | None = Field(
        default=None, description="folder of the images that the data name by path"
    )
    samples: int = Field(default=128, ge=1, description="calibration samples")
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="seed of the choice of samples, and of all else that is drawn",
    )
    max_length: int = Field(
        default=2048, ge=1, description="most tokens of a sample; a longer one is an error"
    )
    text_only: bool = Field(default=False, description="allow calibration without images")

    token_weights: TokenWeightSource = Field(
        default="qig",
        description="how tokens are weighted in the losses; modality (mbq) and gradient need a "
        "backward pass of the whole model, with all of it in memory",
    )
    iqr: bool = Field(default=True, description="clip token importance to the quartile fences")
    baseline: Literal["zero", "quantized"] = Field(
        default="zero",
        description="start of the integration path (default: zero, for w4a8 quantized)",
    )
    quadrature: Literal["gauss", "uniform"] = Field(
        default="gauss", description="rule along the path"
    )
    # The cheapest that holds on trained models: completeness within 1% and a mean rank correlation
    # of 0.994 with 128 equal steps; 4 nodes miss 2%, and so do the paper's 32 equal steps
    # (tests/benchmarks/quadrature.py). qig+'s scales are as good with 2, in 0.4 of the time.
    steps: int = Field(
        default=6,
        ge=1,
        le=256,
        description="nodes of the quadrature; Gauss has 6 where fewer miss completeness by 2%, "
        "weights alone quantized",
    )

    equalize: EqualizeKind = Field(
        default="search",
        description="how equalization scales are chosen; channels: each channel's for itself, by a "
        "model of the rounding noise",
    )
    grid: int = Field(default=20, ge=1, description="equalization exponents 0, 1/grid, ...")

    rounding: RoundingName = Field(
        default="nearest",
        description="how weights are rounded; qronos-outputs: rows make up for each other where "
        "the answers' gradients allow it, which takes two sweeps over the blocks and up to 8 GiB "
        "beside the activations; qronos: the same without",
    )

    tuning_passes: int = Field(
        default=0,
        ge=0,
        description="passes over the samples in which all scales, codes fixed, are tuned towards "
        "the full-precision model's answers",
    )

    head: Literal[8, 16] = Field(
        default=8, description="bits of the output head; 8: one scale per entry of the vocabulary"
    )
    embeddings: Literal[8, 16] = Field(
        default=8,
        description="bits of the embedding; a tied model has one tensor for both, which has 8 bits "
        "if both may; Gemma 4's embedding for every block, too",
    )

    pad_mlp: bool | None = Field(
        default=None,
        description="where 2, 4 or 8 devices cannot share the groups of an MLP, store channels of "
        "zeros behind its own, so that they can (default: from 20 billion weights on)",
    )

    batch_tokens: int = Field(
        default=2048, ge=1, description="tokens of a batch that passes a block"
    )
    device: str = Field(
        default="auto", description="cpu, cuda, cuda:1, ... (auto: a GPU if there is one)"
    )
    offload: Literal["ram", "disk"] = Field(
        default="ram", description="where activations are kept between blocks"
    )
    allow_fallbacks: bool = Field(
        default=False, description="finish even if a step had to fall back to a simpler one"
    )

    @field_validator("head", "embeddings", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        """The command line has text."""
        return int(value) if isinstance(value, str) and value.isdecimal() else value

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_method(cls, values: Any) -> Any:
        """Fills what is not set from the method and the scheme."""
        if not isinstance(values, dict):
            return values
        method = str(values.get("method", "qig+"))
        filled = dict(METHODS.get(method, {}))
        scheme = SCHEMES.get(str(values.get("scheme", "w3a16")))
        if scheme is not None and scheme.activation_bits is not None:
            filled["baseline"] = "quantized"
        return {**filled, **values}

    @model_validator(mode="after")
    def _consistent(self) -> QuantRecipe:
        scheme = get_scheme(self.scheme)
        if self.baseline == "quantized" and scheme.activation_bits is None:
            raise ValueError(
                f"baseline quantized needs quantized activations, which {self.scheme} does not have"
            )
        return self

    @property
    def quant_scheme(self) -> QuantScheme:
        """The scheme of the weights."""
        return get_scheme(self.scheme)

    @property
    def weighting(self) -> TokenWeighting:
        """How tokens are weighted."""
        return TokenWeighting(
            self.token_weights, self.iqr, self.baseline, self.quadrature, self.steps
        )

    @property
    def equalization(self) -> Equalization:
        """How equalization scales are chosen."""
        return Equalization(self.equalize, self.grid, self.weighting, self.rounding_method.damping)

    @property
    def rounding_method(self) -> Rounding:
        """The row of the rounding method."""
        return ROUNDINGS[self.rounding]

    @property
    def needs_groups(self) -> bool:
        """Whether anything is searched or weighed: round-to-nearest alone needs no activations."""
        return self.equalize != "none" or self.token_weights != "uniform"

    @property
    def needs_model_gradients(self) -> bool:
        """Whether token weights come from a backward pass of the whole model."""
        return self.token_weights in ("modality", "gradient")

    @property
    def candidates(self) -> int:
        """Choices of scales that a search tries, round to nearest among them."""
        tried = {"channels": 2, "search": self.grid, "smoothquant": 2, "none": 1}
        return tried[self.equalize]

    def recorded(self) -> dict[str, Any]:
        """What the checkpoint says: all but EXECUTION_FIELDS."""
        return self.model_dump(mode="json", exclude=set(EXECUTION_FIELDS))

    def to_yaml(self) -> str:
        """All fields as YAML, readable by `load_recipe`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


# The paper's settings: 128 image-caption pairs, 32 equal steps, 20 exponents, MAE, IQR clip, the
# full-precision path with a zero baseline (w3a16) or the quantized input (w4a8); the decoder's
# linears alone.
_PAPER = {"method": "qig", "quadrature": "uniform", "steps": 32, "head": 16, "embeddings": 16}
PRESETS: dict[str, dict[str, Any]] = {
    "paper-w3a16": {"scheme": "w3a16", "baseline": "zero", **_PAPER},
    "paper-w4a8": {"scheme": "w4a8", "baseline": "quantized", **_PAPER},
    "ours-w3a16": {"scheme": "w3a16", "method": "qig+"},
    "ours-w4a8": {"scheme": "w4a8", "method": "qig+"},
}


def make_recipe(values: dict[str, Any], where: str = "recipe") -> QuantRecipe:
    """A validated recipe; UserError with one sentence that names the field."""
    try:
        return QuantRecipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(QuantRecipe.model_fields)
            raise UserError(f"{where}: unknown field {place!r}; the fields are {known}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}: {place + ': ' if place else ''}{message}") from None


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands twice")
        return super().construct_mapping(node, deep)


def load_recipe(name_or_path: str) -> dict[str, Any]:
    """The explicit fields of a preset or of a YAML file; validated by `make_recipe` later."""
    if name_or_path in PRESETS:
        return dict(PRESETS[name_or_path])
    path = Path(name_or_path)
    if not path.is_file():
        raise UserError(
            f"no recipe file {name_or_path}, and no preset of that name: "
            f"the presets are {', '.join(PRESETS)}"
        )
    text = read_text(path)
    try:
        values = yaml.load(text, _OnceLoader)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2026-13-01: ValueError
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold fields and values, one on each line")
    return values
