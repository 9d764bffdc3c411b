"""Activations: where they wait, how they are caught, and how one module runs quantized.

One decoder block is resident at a time and one batch passes it at a time. What a stream of hidden
states holds between blocks waits in host memory or on disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qig_serve.errors import UserError
from qig_serve.formats import QuantScheme
from qig_serve.offline.disk import disk_errors
from qig_serve.offline.source.stand_ins import Fetch
from qig_serve.packing import fake_quantize, fake_quantize_activation, scale_dtype


class Store:
    """One tensor per batch, in host memory, or in files of `folder` if that is given."""

    def __init__(self, folder: Path | None = None, name: str = "") -> None:
        self._folder = folder
        self._name = name
        self._tensors: dict[int, torch.Tensor] = {}
        self._added = 0

    def put(self, index: int, tensor: torch.Tensor) -> None:
        """Keep the tensor of batch `index`; an earlier one is replaced."""
        tensor = tensor.detach()
        if self._folder is None:
            self._tensors[index] = tensor.to("cpu")
        else:
            path = self._path(self._folder, index)
            with disk_errors(path):
                save_file({"tensor": tensor.to("cpu").contiguous()}, path)

    def get(self, index: int, device: torch.device | str) -> torch.Tensor:
        """The tensor of batch `index` on a device."""
        if self._folder is None:
            return self._tensors[index].to(device)
        return load_file(self._path(self._folder, index), device=str(device))["tensor"]

    def adder(self) -> Callable[[torch.Tensor], Fetch]:
        """A function that keeps a tensor more, the same one once, and returns what fetches it.

        For stores that are filled in no other way; the tensors outlive the function.
        """
        kept: dict[int, Fetch] = {}

        def add(tensor: torch.Tensor) -> Fetch:
            if id(tensor) not in kept:
                self._added += 1
                self.put(self._added, tensor)
                kept[id(tensor)] = partial(self.get, self._added)
            return kept[id(tensor)]

        return add

    def rows(self, index: int, rows: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """Some rows of the tensor of batch `index` on a device; no others are moved there."""
        return self.get(index, "cpu")[rows].to(device)

    def copy(self, name: str) -> Store:
        """Another store with the same tensors."""
        other = Store(self._folder, name)
        if self._folder is None:
            other._tensors = dict(self._tensors)
        else:
            for path in self._folder.glob(f"{self._name}-*.safetensors"):
                number = path.stem.removeprefix(f"{self._name}-")
                with disk_errors(path):
                    shutil.copyfile(path, self._folder / f"{name}-{number}.safetensors")
        return other

    def _path(self, folder: Path, index: int) -> Path:
        return folder / f"{self._name}-{index}.safetensors"

    def clear(self) -> None:
        """Forget all tensors."""
        self._tensors.clear()
        if self._folder is not None:
            for path in self._folder.glob(f"{self._name}-*.safetensors"):
                path.unlink()


@dataclass(frozen=True)
class ModuleCall:
    """How a block calls one of its modules, so that the call can be repeated with other inputs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        """The module's input, [B, T, C]."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    @property
    def only_hidden(self) -> bool:
        """Whether the module gets nothing but its input, so that it treats tokens one by one."""
        return len(self.args) + len(self.kwargs) == 1

    def without_input(self) -> ModuleCall:
        """The call less its input, which is large; masks and position embeddings stay."""
        if self.args:
            return ModuleCall((None, *self.args[1:]), self.kwargs)
        return ModuleCall((), {**self.kwargs, "hidden_states": None})

    def with_input(self, hidden: torch.Tensor) -> ModuleCall:
        """The same call with another input."""
        if self.args:
            return ModuleCall((hidden, *self.args[1:]), self.kwargs)
        return ModuleCall((), {**self.kwargs, "hidden_states": hidden})


def first_output(output: Any) -> torch.Tensor:
    """The hidden states among what a module returns."""
    return output[0] if isinstance(output, tuple) else output


class _Caught(Exception):
    """Ends a forward pass once everything wanted from it is there."""


def catch_call(
    block: nn.Module, module: nn.Module, hidden: torch.Tensor, kwargs: Mapping[str, Any]
) -> ModuleCall:
    """The call that `block(hidden, **kwargs)` makes to `module`; the pass ends there.

    Of a module that is given tokens laid end to end [B T, C] the input is shaped [B, T, C] as
    everywhere.
    """
    caught: list[ModuleCall] = []

    def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        caught.append(ModuleCall(args, dict(named)))
        raise _Caught

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        block(hidden, **kwargs)
    except _Caught:
        call = caught[0]
        if call.hidden.dim() == 2:
            call = call.with_input(call.hidden.unflatten(0, hidden.shape[:2]))
        return call
    finally:
        handle.remove()
    raise RuntimeError("the block did not call the module")


def run_module(
    module: nn.Module, call: ModuleCall, weights: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """The module's output [B, T, N], some parameters replaced (name in the module -> value)."""
    if not weights:
        return first_output(module(*call.args, **call.kwargs))
    output = torch.func.functional_call(module, dict(weights), call.args, call.kwargs)
    return first_output(output)


class _StraightThrough(torch.autograd.Function):
    """`quantize_activation_ste`; of x + (q - x).detach() the sums cost as much as q."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize_activation(x)

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def quantize_activation_ste(x: torch.Tensor) -> torch.Tensor:
    """int8 quantize-dequantize per token, with the gradient of the identity.

    Rounding has zero gradient almost everywhere: without the straight-through estimator the
    quantized branch would be a constant, and the attribution that of full precision alone.
    """
    codes: torch.Tensor = _StraightThrough.apply(x)  # type: ignore[no-untyped-call]
    return codes


@contextmanager
def quantized_activations(linears: Sequence[nn.Module], enabled: bool = True) -> Iterator[None]:
    """Inside, the inputs of these linears are int8-quantized per token (straight-through)."""
    last: tuple[Any, Any] = (None, None)  # linears that share an input share its codes

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal last
        if args[0] is not last[0]:
            last = args[0], quantize_activation_ste(args[0])
        return (last[1], *args[1:])

    handles = [m.register_forward_pre_hook(hook) for m in linears] if enabled else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def quantized_weights(
    module: nn.Module,
    linears: Sequence[str],
    columns: torch.Tensor | None,
    scheme: QuantScheme,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Q(W diag(s)) of a module's linears, round-to-nearest: parameter name -> fp32 [N, K].

    `linears` are names inside the module ("" is the module itself); `dtype` is the model's.
    """
    weights = {}
    for name in linears:
        weight = module.get_submodule(name).weight.detach().float()
        if columns is not None:
            weight = weight * columns
        key = f"{name}.weight" if name else "weight"
        weights[key] = fake_quantize(weight, scheme, scale_dtype(scheme, dtype))
    return weights


def all_linears(module: nn.Module, kept: Sequence[str] = ()) -> list[nn.Module]:
    """The linears of a module, itself included: those whose inputs w4a8 quantizes.

    `kept` are names, inside the module, of linears that stay in 16 bits.
    """
    return [m for n, m in module.named_modules() if isinstance(m, nn.Linear) and n not in kept]


def check_finite(tensor: torch.Tensor, what: str) -> None:
    """UserError when the tensor holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(
            f"{what}: NaN or infinity. Check that the model's weights are intact and that it works "
            "in full precision."
        )


@contextmanager
def within_range(module: nn.Module, dtype: torch.dtype, what: str) -> Iterator[None]:
    """Inside, UserError for what a module or a leaf of it reads or gives and `dtype` cannot hold.

    dtype: the model's. Such values are infinite where it is served in float16, and answers NaN;
    computed in fp32, as here, nothing is amiss.
    """
    most = torch.finfo(dtype).max

    def hook(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for value in (*args[:1], *(output if isinstance(output, tuple) else [output])):
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            largest = float(value.abs().amax()) if value.numel() else 0.0
            if most < largest < float("inf"):  # what is infinite here is told apart elsewhere
                raise UserError(
                    f"{what}: values up to {largest:.3g} in {names[part]}, more than {dtype}, the "
                    "dtype of config.json, can hold: set that to bfloat16"
                )

    names: dict[nn.Module, str] = {}
    if most < torch.finfo(torch.bfloat16).max:
        parts = dict(module.named_modules())
        names = {m: n or "its output" for n, m in parts.items() if not n or not any(m.children())}
    handles = [part.register_forward_hook(hook) for part in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
