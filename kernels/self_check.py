"""Before anything is served: do the kernels compute here what the checkpoint says?

They are compiled for the card at hand, which may be one that nobody has run them on, and a wrong
one would answer, only nonsense. So the first layer of every shape is given random inputs, as many
tokens as each of its tiles is for, and compared with the oracle (reference.py) on some rows. Right
kernels are then off by a few thousandths, and one wrong code in 128 makes ten times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from qig_serve.formats import SCHEMES
from qig_serve.kernels import reference
from qig_serve.kernels.library import ExpertsJob, LinearJob, Prepared
from qig_serve.packing import unpack_linear

TOLERANCE = 0.02
"""Largest error of a layer's outputs against the oracle's, relative to their norm."""
_ROWS = 64  # compared, at each end of a weight and in the middle of it
_TOKENS = 32  # compared, the first and the last
_faults: dict[LinearJob | ExpertsJob, str] = {}


def known(job: LinearJob | ExpertsJob) -> str | None:
    """The fault of layers of this shape, empty for none; None if this process has not looked."""
    return _faults.get(job)


def keep(job: LinearJob | ExpertsJob, fault: str) -> str:
    """Makes the fault `known`, and returns it."""
    _faults[job] = fault
    return fault


class Rows:
    """Some rows of a layer's stored tensors [N, ...], kept while the kernels' own are made."""

    def __init__(self, tensors: Prepared) -> None:
        n = len(tensors["weight_scale"])
        middle = n // 2
        wanted = {*range(_ROWS), *range(middle, middle + _ROWS), *range(n - _ROWS, n)}
        device = tensors["weight_scale"].device
        self.ids = torch.tensor(sorted(wanted & set(range(n))), device=device)
        self.tensors = {name: tensor[self.ids] for name, tensor in tensors.items()}


def fault_of_linear(
    job: LinearJob,
    rows: Rows,
    counts: Iterable[int],
    multiply: Callable[[torch.Tensor], torch.Tensor],
) -> str:
    """What is wrong with a linear's product, in words; empty if nothing is.

    multiply: x [M, K] -> [M, N]; counts: the numbers of tokens that it is tried with.
    """

    def error(m: int) -> float:
        x, some = _random(m, job.k, job.dtype, job.device), _some(m, job.device)
        got = multiply(x)[some][:, rows.ids]
        return _error(got, oracle(job.scheme.name, x[some], rows.tensors))

    return _fault(f"the kernels of {job.scheme.name}", job.device, counts, error)


def fault_of_lookup(
    job: LinearJob, rows: Rows, look_up: Callable[[torch.Tensor], torch.Tensor]
) -> str:
    """The same of a table's rows. look_up: ids [M] -> [M, K]."""

    def error(m: int) -> float:
        return _error(look_up(rows.ids[:m]), unpack_linear(rows.tensors, job.scheme)[:m])

    counts = (1, len(rows.ids))
    return _fault(f"the look-up in {job.scheme.name}", job.device, counts, error)


def fault_of_experts(
    job: ExpertsJob,
    stored: tuple[list[Prepared], list[Prepared]],
    counts: Iterable[int],
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> str:
    """The same of a layer of experts. stored: gate_up and down of the first ones.

    run: x [M, K], routing and ids [M, top_k] -> [M, K]."""
    top_k = min(job.top_k, given := len(stored[0]))

    def error(m: int) -> float:
        x, some = _random(m, job.k, job.dtype, job.device), _some(m, job.device)
        routing = _random(m, given, torch.float32, job.device)
        ids = routing.argsort(dim=1)[:, :top_k].to(torch.int32)
        routing = routing[:, :top_k].abs().contiguous()
        tried = x[some], routing[some], ids[some]
        wanted = reference.experts(*tried, *stored, job.scheme, job.activation)
        return _error(run(x, routing, ids)[some], wanted)

    return _fault(f"the kernels of {job.scheme} experts", job.device, counts, error)


def oracle(scheme: str, x: torch.Tensor, tensors: Prepared) -> torch.Tensor:
    """x [M, K] times a stored linear of N rows, in fp32: [M, N]."""
    if SCHEMES[scheme].activation_bits is not None:
        return reference.w4a8_linear(x, tensors["weight_packed"], tensors["weight_scale"])
    return x.float() @ unpack_linear(tensors, SCHEMES[scheme]).t()


def _fault(
    what: str, device: torch.device, counts: Iterable[int], error: Callable[[int], float]
) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "this processor"
    for m in counts:
        try:
            found = error(m)
        except torch.OutOfMemoryError:
            raise  # no fault of the kernels
        except Exception as failure:  # a compiler's, a launch's: whatever it is, it cannot serve
            return f"{what} do not run on {where} for {m} tokens: {' '.join(str(failure).split())}"
        if not found <= TOLERANCE:
            return f"{what} are {found:.0%} off on {where} for {m} tokens"
    return ""


def _random(m: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(m)
    return torch.randn(m, k, generator=generator, device=device, dtype=dtype)


def _some(m: int, device: torch.device) -> torch.Tensor:
    """Tokens that are compared."""
    ends = {*range(min(m, _TOKENS)), *range(max(0, m - _TOKENS), m)}
    return torch.tensor(sorted(ends), device=device)


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to what is wanted, as far as got's dtype goes; 0 where both are zeros."""
    most = torch.finfo(got.dtype).max
    wanted = wanted.clamp(-most, most)
    got = torch.nan_to_num(got.float(), nan=torch.nan, posinf=most, neginf=-most)
    difference, norm = (got - wanted).norm(), wanted.norm()
    return float(difference / norm) if norm > 0 else float(difference)
