"""Round one linear: range search, error compensation (GPTQ, GPTAQ, Qronos), scale refit.

    accumulator = StatsAccumulator(k, cross=True)
    accumulator.accumulate(x_q, x_fp, token_weights)      # once a batch
    rounded = round_linear(weight, accumulator.finish(), scheme, model_dtype, options, name=...)
    packing.pack_linear(rounded.codes, rounded.scale, rounded.zero, scheme, model_dtype)

Pure functions of one weight [N, K] and its input statistics; torch only; deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from qig_serve.errors import UserError
from qig_serve.formats import QuantScheme
from qig_serve.offline import compensation as comp
from qig_serve.offline.ranges import clipping, search_range
from qig_serve.offline.ranks import ALONE, Ranks
from qig_serve.packing import dequantize, minmax_params, quantize, scale_dtype

RangeSearch = Literal["minmax", "mse", "energy", "conditional", "hessian"]
Compensation = Literal["none", "gptq", "gptaq", "qronos"]
DampBy = Literal["column", "mean"]


@dataclass
class LinearStats:
    """Token-weighted second moments of a linear's input, sum of token weights normalized to 1."""

    hessian: torch.Tensor
    """sum_t lambda_t x_q,t x_q,t^T, fp32 [K, K]: of the inputs the quantized layers before give."""
    cross: torch.Tensor | None = None
    """sum_t lambda_t (x_fp - x_q)_t x_q,t^T, fp32 [K, K], for GPTAQ and Qronos; else None."""
    tokens: int = 0
    """Tokens with a positive weight."""
    halves: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    """(hessian, cross) of two halves of the samples: their sums are the two above."""
    _factors: dict[tuple[float, bool, bool], comp.Factor] = field(default_factory=dict, repr=False)

    @property
    def act_energy(self) -> torch.Tensor:
        """Mean square of each input channel, [K]."""
        return self.hessian.diagonal()

    def factor(self, damp: float, act_order: bool, by_column: bool) -> comp.Factor:
        """The factored Hessian; kept, since fused linears (q, k, v; gate, up) share their input."""
        key = (damp, act_order, by_column)
        if key not in self._factors:
            self._factors[key] = comp.factorize(self.hessian, *key)
        return self._factors[key]


class StatsAccumulator:
    """Sums LinearStats over batches of tokens; with `halves`, two sets of batches apart."""

    def __init__(
        self,
        k: int,
        cross: bool = False,
        device: torch.device | str = "cpu",
        halves: bool = False,
    ) -> None:
        if halves and not cross:
            raise ValueError("halves are for the target shift: they need cross=True")

        def zeros() -> list[torch.Tensor]:
            return [torch.zeros(k, k, device=device) for _ in range(2 if halves else 1)]

        self._hessians = zeros()
        self._crosses = zeros() if cross else []
        self._batches = 0
        self._weight = 0.0
        self._tokens = 0

    def accumulate(
        self,
        x_q: torch.Tensor,
        x_fp: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
    ) -> None:
        """Add T tokens: x_q and x_fp [T, K], token_weights [T] >= 0 (None: all one).

        x_fp is the same tokens' input in the full-precision model; needed if `cross`.
        """
        x_q = x_q.float()
        if token_weights is None:
            weights = torch.ones(len(x_q), device=x_q.device)
        else:
            weights = token_weights.to(x_q.device).float()
        if weights.shape != x_q.shape[:1] or bool((weights < 0).any()):
            raise ValueError(
                f"token weights must be non-negative, one a token: {tuple(weights.shape)} "
                f"for inputs {tuple(x_q.shape)}"
            )
        keep = weights > 0
        # The root, because it enters twice: H = (sqrt(lambda) X)^T (sqrt(lambda) X).
        root = weights[keep].sqrt()[:, None]
        left = x_q[keep] * root
        part = self._batches % len(self._hessians)
        self._batches += 1
        self._hessians[part].addmm_(left.T, left)
        if self._crosses:
            if x_fp is None:
                raise ValueError("the accumulator was made with cross=True: x_fp is needed")
            delta = (x_fp.float() - x_q)[keep] * root
            self._crosses[part].addmm_(delta.T, left)
        self._weight += float(weights.double().sum())
        self._tokens += int(keep.sum())

    def finish(self, ranks: Ranks = ALONE) -> LinearStats:
        """The statistics of all processes, divided by the sum of token weights.

        ValueError when that is zero.
        """
        self._weight, tokens = ranks.total(self._weight, self._tokens)
        self._tokens = int(tokens)
        for tensor in (*self._hessians, *self._crosses):
            ranks.sum(tensor)
        if not self._weight > 0:
            raise ValueError("no token with a positive weight was accumulated")
        for tensor in (*self._hessians, *self._crosses):
            tensor.div_(self._weight)
        hessian = self._hessians[0]
        cross = self._crosses[0] if self._crosses else None
        if len(self._hessians) == 1 or cross is None:
            return LinearStats(hessian, cross, self._tokens)
        return LinearStats(
            hessian + self._hessians[1],
            cross + self._crosses[1],
            self._tokens,
            tuple(zip(self._hessians, self._crosses, strict=True)),
        )


@dataclass(frozen=True)
class RoundingOptions:
    """What `round_linear` does. Every step has its off switch."""

    range_search: RangeSearch = "conditional"
    """What a rounding error costs while scales and zero points are searched: "minmax" does not
    search; "mse" weighs all inputs alike; "energy" by mean square activation; "conditional" by
    what is left of it after compensation by the columns that follow (1 / U_kk^2 of GPTQ's
    factor); "hessian" is the quadratic form of the group's own block of H."""
    range_grid: int = 40
    """Scales tried a group, from 1.0 down to 0.35 of the min-max scale."""
    zero_window: int = 2
    """Zero points tried on either side of the min-max one (asymmetric schemes)."""
    range_rounds: int = 3
    """Rounds of: search the ranges again, now for the values that compensation really rounds
    (which spread wider than the weights), then compensate anew; the best a row is kept."""
    compensation: Compensation = "qronos"
    """"gptaq" and "qronos" need `LinearStats.cross`; they differ in the target, see
    compensation.shifted_target."""
    shift_strength: float = 1.0
    """Fraction of the target shift of GPTAQ or Qronos that is applied."""
    validate_shift: bool = False
    """Choose strength and damping of Qronos' shift by cross-validation; needs
    `LinearStats.halves`. See compensation.validated_target."""
    act_order: bool = True
    """Columns in descending order of energy; groups stay those of the stored layout."""
    damp: float = 0.01
    """Added to H's diagonal, as a fraction of `damp_by`."""
    damp_by: DampBy = "column"
    """"column": of each entry itself; "mean": of the diagonal's mean, as in GPTQ."""
    block_size: int = 128
    """Columns updated lazily together; no effect on the result beyond rounding."""
    scale_refit: bool = True
    """Closed-form scales after rounding."""
    polish_sweeps: int = 1
    """Coordinate-descent sweeps over codes, each followed by a scale refit if that is on."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("range_search", RangeSearch),
            ("compensation", Compensation),
            ("damp_by", DampBy),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(allowed))}, "
                    f"not {getattr(self, name)!r}"
                )


@dataclass
class RoundedLinear:
    """What is stored of a linear, and how good it is."""

    codes: torch.Tensor
    """[N, K], uint8, or int8 if the scheme is symmetric."""
    scale: torch.Tensor
    """fp32 [N, G], values that the stored dtype holds exactly."""
    zero: torch.Tensor | None
    """uint8 [N, G], or None if symmetric."""
    report: dict[str, Any]
    """Output error after each step: see `round_linear`."""

    def to(self, device: torch.device | str) -> RoundedLinear:
        """The same on another device."""
        zero = None if self.zero is None else self.zero.to(device)
        return RoundedLinear(self.codes.to(device), self.scale.to(device), zero, self.report)

    def dequantized(self) -> torch.Tensor:
        """The weight [N, K] in fp32 that the codes stand for."""
        return dequantize(self.codes, self.scale, self.zero)


def round_linear(
    weight: torch.Tensor,
    stats: LinearStats,
    scheme: QuantScheme,
    dtype: torch.dtype,
    options: RoundingOptions | None = None,
    name: str = "linear",
) -> RoundedLinear:
    """Quantize a weight [N, K] for inputs with the given statistics.

    `dtype` is the model's; scales are rounded to what the scheme stores for it. The report holds
    `output_energy` = tr(W H W^T) and, as fractions of it, tr((T - Q) H (T - Q)^T) of
    round-to-nearest with min-max ranges ("rtn") and after each step ("range", "compensation",
    "rounds", "refit", "polish"); T is W, or the shifted target where compensation is GPTAQ or
    Qronos; what `ranges.clipping` says; and "damping_raised", the factor by which damping had to
    grow, if it had to. UserError names the linear when weight or statistics
    are not finite.
    """
    options = options or RoundingOptions()
    stored = scale_dtype(scheme, dtype)
    _check_finite(name, weight, stats)
    w = weight.float()
    target = w
    factor = validated = None
    if options.compensation != "none" or options.range_search == "conditional":
        factor = stats.factor(options.damp, options.act_order, options.damp_by == "column")
    if factor is not None and options.compensation in ("gptaq", "qronos"):
        if stats.cross is None:
            raise ValueError(f"{name}: {options.compensation} needs LinearStats.cross")
        masked = options.compensation == "gptaq"
        if options.validate_shift:
            if masked or not stats.halves:
                raise ValueError(f"{name}: validate_shift needs qronos and LinearStats.halves")
            target, validated = comp.validated_target(w, stats.halves)
        else:
            target = comp.shifted_target(w, stats.cross, factor, masked, options.shift_strength)

    energy = float(comp.objective(w, stats.hessian).double().sum())
    report: dict[str, Any] = {"output_energy": energy, "tokens": stats.tokens}
    if validated is not None:
        report |= {"shift": validated.strength, "shift_damp": validated.damp}
    if factor is not None and factor.raised:
        report["damping_raised"] = 10**factor.raised

    def record(step: str, codes: torch.Tensor, scale: torch.Tensor) -> None:
        error = comp.objective(target - dequantize(codes, scale, zero), stats.hessian)
        report[step] = float(error.double().sum()) / max(energy, 1e-30)

    scale, zero = minmax_params(w, scheme, stored)
    codes = quantize(w, scale, zero, scheme)
    record("rtn", codes, scale)
    if options.range_search != "minmax":
        metric = _range_metric(stats, scheme, options.range_search, factor)
        scale, zero = search_range(
            target, scheme, stored, metric, options.range_grid, zero_window=options.zero_window
        )
        codes = quantize(target, scale, zero, scheme)
        record("range", codes, scale)
    if factor is not None and options.compensation != "none":
        codes, values = comp.gptq(target, factor, scheme, scale, zero, options.block_size)
        record("compensation", codes, scale)
        metric = _range_metric(stats, scheme, "conditional", factor)
        best = comp.objective(target - dequantize(codes, scale, zero), stats.hessian)
        for _ in range(options.range_rounds):
            s, z = search_range(
                values, scheme, stored, metric, options.range_grid, zero_window=options.zero_window
            )
            c, values = comp.gptq(target, factor, scheme, s, z, options.block_size)
            error = comp.objective(target - dequantize(c, s, z), stats.hessian)
            better = (error < best)[:, None]
            best = torch.minimum(error, best)
            codes, scale = torch.where(better, c, codes), torch.where(better, s, scale)
            if zero is not None and z is not None:
                zero = torch.where(better, z, zero)
            record("rounds", codes, scale)
    if options.scale_refit:
        scale = comp.refit_scales(target, stats.hessian, codes, scale, zero, stored)
        record("refit", codes, scale)
    for _ in range(options.polish_sweeps):
        codes = comp.polish_codes(
            target, stats.hessian, codes, scheme, scale, zero, options.block_size
        )
        if options.scale_refit:
            scale = comp.refit_scales(target, stats.hessian, codes, scale, zero, stored)
        record("polish", codes, scale)
    report |= clipping(w, scale, zero, scheme, stored)
    return RoundedLinear(codes, scale, zero, report)


def _range_metric(
    stats: LinearStats, scheme: QuantScheme, kind: RangeSearch, factor: comp.Factor | None
) -> torch.Tensor:
    """What an error costs inside each group: [G, S], or [G, S, S] for "hessian"."""
    k = len(stats.hessian)
    groups = scheme.num_groups(k)
    size = k // groups
    energy = stats.act_energy
    if kind == "mse":
        return torch.ones(groups, size, device=energy.device)
    # Inputs never seen still get a say: they may turn up after calibration.
    floor = 1e-6 * float(energy.mean()) or 1.0
    if kind == "hessian":
        h = stats.hessian.view(groups, size, groups, size)
        index = torch.arange(groups, device=energy.device)
        return h[index, :, index] + floor * torch.eye(size, device=energy.device)
    if kind == "conditional" and factor is not None:
        energy = torch.where(energy > 0, factor.conditional_energy(), energy)
    return energy.clamp(min=floor).view(groups, size)


def _check_finite(name: str, weight: torch.Tensor, stats: LinearStats) -> None:
    tensors = {"weight": weight, "calibration statistics": stats.hessian}
    if stats.cross is not None:
        tensors["full-precision calibration statistics"] = stats.cross
    for what, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{name}: the {what} hold NaN or infinity. If it is the weight, the checkpoint "
                "is damaged; if it is the statistics, run the model in bfloat16 or float32."
            )
