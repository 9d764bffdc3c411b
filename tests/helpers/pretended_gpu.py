"""A GPU that is not there: tensors that say they are on one, and refuse what CUDA refuses.

    with pretended_gpu():
        quantize(model, output, recipe)     # recipe.device = "cuda"

Their numbers lie on the CPU, and every operation is computed there. What is refused: an operation
on tensors of two devices, a CPU's generator for a tensor of the GPU, `numpy()`. No kernel runs.
What tensors there take is counted (`Memory`); what an operation takes for itself is not.
In a process that loaded one_gpu.py before torch.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qig_serve.offline.rounding import columns

aten = torch.ops.aten
GPU = torch.device("cuda:0")
_MOVES = {aten.copy_.default, aten._to_copy.default}
_INDEXED = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default, aten._unsafe_index.Tensor,
}  # fmt: skip
"""CUDA lets indices lie on the CPU."""
_READ = {"__float__", "__int__", "__bool__", "__index__", "__len__", "tolist", "item"}
"""Read values, by way of a device guard that a build without CUDA does not have."""


class Memory:
    """Bytes of the GPU that tensors hold."""

    live = 0
    peak = 0

    @classmethod
    def reset_peak(cls) -> None:
        """As torch.cuda.reset_peak_memory_stats."""
        cls.peak = cls.live


class _Held:
    """A storage on the GPU, for as long as a tensor has it."""

    every: ClassVar[weakref.WeakValueDictionary[int, _Held]] = weakref.WeakValueDictionary()

    def __init__(self, size: int) -> None:
        self.size = size
        Memory.live += size
        Memory.peak = max(Memory.peak, Memory.live)

    def __del__(self) -> None:
        Memory.live -= self.size

    @classmethod
    def by(cls, tensor: torch.Tensor) -> _Held:
        """The same for tensors that share it."""
        storage = tensor.untyped_storage()
        held = cls.every.get(storage._cdata)
        if held is None:
            held = cls.every[storage._cdata] = cls(storage.nbytes())
        return held


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, around one on the CPU."""

    inner: torch.Tensor
    held: _Held
    made = 0
    """How many there have been."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGpu:
        made: OnGpu = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=GPU,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner.detach()
        made.held = _Held.by(inner)
        OnGpu.made += 1
        return made

    def __repr__(self) -> str:
        return f"OnGpu({self.inner})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _inner(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.inner if isinstance(value, OnGpu) else value


def _all(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _all(value)


def _with(function: Callable[[Any], Any], value: Any) -> Any:
    """What tree_map does, at a tenth of its price, with what operators take and give."""
    if isinstance(value, list | tuple):
        return type(value)([_with(function, one) for one in value])
    return function(value)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    every = [*_all(args), *_all(kwargs.values())]
    on_gpu = [tensor for tensor in every if isinstance(tensor, OnGpu)]
    devices = [torch.device(value) for value in (kwargs.get("device"),) if value is not None]
    devices += [value for value in args if isinstance(value, torch.device)]  # of aten.to
    target = devices[0] if devices else None
    if not on_gpu and (target is None or target.type != "cuda"):
        return func(*args, **kwargs)
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: a CPU's generator for a tensor on cuda")
    if on_gpu and func not in _MOVES and target is None:
        for other in _all(args[:1]) if func in _INDEXED else every:
            if not isinstance(other, OnGpu) and other.dim():
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found cuda:0 and cpu: "
                    f"{func}, {[tuple(t.shape) for t in every]}"
                )
    inner = {key: _with(_inner, value) for key, value in kwargs.items() if key != "pin_memory"}
    if "device" in inner:
        inner["device"] = torch.device("cpu")
    out = func(*_with(_inner, tuple(args)), **inner)
    if func is aten.copy_.default:
        return args[0]
    if target is not None and target.type != "cuda":
        return out
    known = {id(tensor.inner): tensor for tensor in on_gpu}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else OnGpu(value)

    return _with(wrapped, out)


class _Made(TorchDispatchMode):
    """Makes what is asked for on a GPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Indexed(TorchFunctionMode):
    """Calls "cuda" "cuda:0", as torch with CUDA does."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def indexed(value: Any) -> Any:
            is_device = isinstance(value, str | torch.device)
            return GPU if is_device and value in ("cuda", torch.device("cuda")) else value

        if getattr(func, "__name__", "") in _READ and isinstance(args[0], OnGpu):
            return func(args[0].inner)
        args, kwargs = _with(indexed, tuple(args)), dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = indexed(kwargs["device"])
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == GPU:
            args = _with(_inner, args)
            return func(*args, **{**kwargs, "device": "cpu"}).to(GPU)
        return func(*args, **kwargs)


def _answering(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value() if callable(value) else value


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """What runs a kernel of the GPU by a function of CPU tensors."""

    def launched(*args: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            made = function(*_with(_inner, args))
        return _with(lambda one: OnGpu(one) if isinstance(one, torch.Tensor) else one, made)

    return launched


def _column_rounding(device: torch.device) -> tuple[Any, str]:
    """In place of the kernel that rounds columns."""
    return (_on_cpu(columns.in_torch) if device.type == "cuda" else columns.in_torch), ""


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """While it lasts torch has a GPU, of 24 GiB, with compute capability 8.9."""
    properties = types.SimpleNamespace(
        total_memory=24 << 30, name="pretended", major=8, minor=9, multi_processor_count=128
    )
    answers: dict[str, Any] = {
        "_lazy_init": None,
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "max_memory_allocated": lambda: Memory.peak,
        "memory_allocated": lambda: Memory.live,
        "reset_peak_memory_stats": Memory.reset_peak,
        "mem_get_info": (23 << 30, 24 << 30),
        "get_device_properties": properties,
        "get_device_capability": (8, 9),
        "get_device_name": "pretended",
    }
    # Parameters of modules that are moved: `param.data = ...` would lose `inner`.
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pytest.MonkeyPatch.context() as patched, _Made(), _Indexed():
            patched.setattr(columns, "_chosen", _column_rounding)
            for name, value in answers.items():
                patched.setattr(torch.cuda, name, _answering(value))
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
