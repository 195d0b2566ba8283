# pyright: reportPrivateUsage=false, reportIncompatibleMethodOverride=false, reportAssignmentType=false, reportArgumentType=false
"""A GPU that is not there: tensors that say they are on cuda:0 while their values lie on the CPU.

    with PretendedGpu() as gpu:
        x = torch.randn(3, 4, device="cuda")
        ...
    gpu.launches, gpu.waits, gpu.bytes, gpu.flops

With `values=False` nothing is computed: tensors have shapes only, for sizes that a CPU could not compute.
Operations between it and the CPU raise, as CUDA would. Counted are the kernels that each operation would launch, and where
the host would wait for the device: to read a number, for indices whose number depends on values, for copies from and to
ordinary memory. Only the thread that enters is watched. (torch's FakeTensorMode cannot do this without a CUDA build.)
"""

import math
import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pipeline.runtime import compiled, transfer
from pipeline.train.weights import scratch

CUDA = torch.device("cuda", 0)
VIEWS = {
    "view", "_unsafe_view", "slice", "select", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "as_strided",
    "detach", "alias", "diagonal", "split", "split_with_sizes", "unbind", "_reshape_alias", "lift_fresh", "unfold", "empty",
    "empty_strided", "empty_like", "new_empty", "new_empty_strided",
}  # fmt: skip
"""Operations that launch nothing."""
LAUNCHES = {"sort": 3, "topk": 15, "nonzero": 4, "bincount": 4, "masked_select": 4}
"""Operations that launch more than one kernel: upper estimates, after ATen's CUDA sources."""
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "mv", "addmv", "dot"}
FUSED = 2
"""Kernels of a compiled function: sums over rows take a second one."""
OVERWRITING = {"copy_", "fill_", "zero_"}
"""Operations that do not read what they write to."""
RATES = {torch.float32: 51e12, torch.bfloat16: 757e12}
TF32 = 399e12
"""Of float32 products whose factors may be rounded, as measured on the same card."""
BANDWIDTH = 2.9e12
"""FLOP/s and bytes/s of an H100, as measured (docs/performance.md)."""
SHORTEST = 2e-6
"""Seconds that the shortest kernel takes."""
WAITS = {"nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "equal", "histc", "multinomial"}
"""Operations whose result has a size that the host must learn, or is a number."""
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


class OnGpu(torch.Tensor):
    """A tensor that says it is on cuda:0. To torch's C++ it is on `meta`, which needs no CUDA build."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls: Any, inner: torch.Tensor) -> "OnGpu":
        """Shape and dtype of the inner tensor."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda _: CUDA)
    is_cuda = property(lambda _: True)
    is_cpu = property(lambda _: False)
    is_meta = property(lambda _: False)

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert PretendedGpu.current, f"{func} outside PretendedGpu"
        return PretendedGpu.current.call(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What torch decides before it dispatches: `cuda` is `cuda:0`, and lists and arrays are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def indexed(value: Any) -> Any:
            is_cuda = value == "cuda" if isinstance(value, str) else isinstance(value, torch.device) and value.type == "cuda"
            return CUDA if is_cuda else value

        if func is torch.Tensor.numpy and isinstance(args[0], OnGpu):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if func is torch.Tensor.tolist and isinstance(args[0], OnGpu):
            assert PretendedGpu.current
            PretendedGpu.current.wait("tolist")
            return args[0].inner.tolist()
        if func is torch.Tensor.__setitem__ and isinstance(args[0], OnGpu) and isinstance(args[2], int | float | bool):
            args = (*args[:2], torch.full((), args[2], dtype=args[0].dtype, device=CUDA))
        if func is torch.Tensor.__getitem__ and isinstance(args[0], OnGpu):
            # torch's C++ would make an index of a list where it believes the tensor to be, on `meta`, without its values.
            args = (args[0], tree_map(_as_index, args[1], is_leaf=lambda value: isinstance(value, list)))
        if func is torch.Tensor.to and len(args) == 2 and isinstance(args[1], OnGpu):
            args = (args[0], CUDA, args[1].dtype)
        args = tuple(map(indexed, args)) if func is torch.Tensor.to else args
        if func is torch.tensor and indexed((kwargs or {}).get("device")) == CUDA:  # made on the host, then copied
            return func(*args, **{name: value for name, value in (kwargs or {}).items() if name != "device"}).to(CUDA)
        return func(*args, **{name: indexed(value) for name, value in (kwargs or {}).items()})


class PretendedGpu(TorchDispatchMode):
    """The device, for as long as the block lasts."""

    current: "PretendedGpu | None" = None

    def __init__(self, *, values: bool = True) -> None:
        super().__init__()
        self.inner = torch.device("cpu" if values else "meta")
        self.reset()

    def reset(self) -> None:
        """Count anew."""
        self.kernels: Counter[tuple[str, str]] = Counter()
        """Launches by operation and line of the package."""
        self.waits: Counter[tuple[str, str]] = Counter()
        """The same of waits."""
        self.bytes = 0
        """Read and written by kernels: every operand once, and every result."""
        self.flops: Counter[torch.dtype] = Counter()
        """Of matrix products, by dtype of their operands."""
        self.seconds = 0.0
        """What the kernels would take one after the other (`RATES`, `BANDWIDTH`, `SHORTEST`): predicted."""

    @property
    def launches(self) -> int:
        """Kernels launched."""
        return self.kernels.total()

    def __enter__(self) -> "PretendedGpu":
        self._stack = ExitStack()
        there: dict[str, Any] = {
            "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
            "synchronize": lambda *_: None, "mem_get_info": lambda *_: (80 * 10**9, 80 * 10**9),
        }  # fmt: skip
        for name, value in there.items():
            self._stack.callback(setattr, torch.cuda, name, getattr(torch.cuda, name))
            setattr(torch.cuda, name, value)
        # Pinned memory and events are of the driver.
        for module, name, value in (
            (transfer, "_host_memory", _host_memory), (transfer, "_recorded", lambda _: None),
            (compiled, "can_compile", lambda: True), (compiled, "run", self._fused),
            (compiled, "recorded", lambda function: function),
        ):  # fmt: skip
            self._stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        # Buffers of another pretended GPU may have no values.
        scratch.clear()
        self._stack.callback(scratch.clear)
        PretendedGpu.current = self
        self._stack.callback(setattr, PretendedGpu, "current", None)
        self._stack.enter_context(_Functions())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    def wait(self, what: str) -> None:
        """The host waits for the device."""
        self.waits[what, _line()] += 1

    def _fused(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """A compiled function: reads its arguments once, writes its results and what it changes once, in FUSED kernels."""
        counted = (self.kernels.copy(), self.bytes, self.flops.copy(), self.seconds)
        read = [tensor for tensor in _tensors((args, kwargs)) if isinstance(tensor, OnGpu)]
        before = [tensor.inner._version for tensor in read]
        result = function(*args, **kwargs)
        self.kernels, self.bytes, self.flops, self.seconds = counted
        changed = [tensor for tensor, version in zip(read, before, strict=True) if tensor.inner._version != version]
        self.kernels[function.__name__, _line()] += FUSED
        moved = sum(map(_bytes, [*read, *changed, *_tensors(result)]))
        self.bytes += moved
        self.seconds += max(SHORTEST * FUSED, moved / BANDWIDTH)
        return result

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation."""
        name = func._schema.name.split("::")[1]
        tensors = _tensors((args, kwargs))
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        # A number that torch's C++ makes on the device of a tensor that it believes to be on `meta`.
        here = device is not None and (device.type == "cuda" or (name == "scalar_tensor" and device.type == "meta"))
        if not here and not any(isinstance(tensor, OnGpu) for tensor in tensors):
            return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            self.wait("item")
            return func(args[0].inner)
        if name in ("copy_", "_to_copy") and (moved := self._moved(name, args, kwargs, device)) is not None:
            return moved
        self._refuse_mixed(name, args, tensors)
        if name in WAITS:
            self.wait(name)
        if name in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.wait("boolean index")
        known: dict[int, OnGpu] = {}

        def inside(value: Any) -> Any:
            if isinstance(value, OnGpu):
                known[id(value.inner)] = value
                return value.inner
            return value

        inner_kwargs = tree_map(inside, kwargs) | ({"device": self.inner} if "device" in kwargs else {})
        result = func(*tree_map(inside, args), **inner_kwargs)
        if name not in VIEWS:
            self.kernels[name, _line()] += LAUNCHES.get(name, 1)
            others = {key: value for key, value in kwargs.items() if key != "out"}
            self._count(name, _tensors((args, others)), _tensors(result))
        return tree_map(lambda value: known[id(value)] if id(value) in known else _on_gpu(value), result)

    def _moved(self, name: str, args: Any, kwargs: dict[str, Any], device: torch.device | None) -> torch.Tensor | None:
        """The result of a copy between the devices; None if it is none."""
        target, source = (None, args[0]) if name == "_to_copy" else args[:2]
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        from_gpu = isinstance(source, OnGpu)
        to_gpu = isinstance(target, OnGpu) or (target is None and device is not None and device.type == "cuda")
        if target is None and device is None:
            return None
        if from_gpu == to_gpu:
            return source if target is None and kwargs.get("dtype") in (None, source.dtype) else None
        if blocking and (from_gpu or source.dim()):
            self.wait("copy from the device" if from_gpu else "copy to the device")
        plain = source.inner if from_gpu else source
        if target is None:
            others = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking")}
            copied = torch.ops.aten._to_copy.default(plain, **others)
            return OnGpu(copied.to(self.inner)) if to_gpu else copied
        if self.inner.type == "cpu":
            (target.inner if to_gpu else target).copy_(plain)
        return target

    def _count(self, name: str, read: list[torch.Tensor], written: list[torch.Tensor]) -> None:
        read = read[1:] if name in OVERWRITING else read
        moved = sum(map(_bytes, read + written))
        flops, dtype = 0, torch.float32
        if name in PRODUCTS:
            left, right = read[-2:]
            flops, dtype = 2 * left.numel() * (right.shape[-1] if right.dim() > 1 else 1), left.dtype
        rate = RATES.get(dtype, RATES[torch.float32])
        if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            rate = TF32
        self.bytes += moved
        self.flops[dtype] += flops
        self.seconds += max(SHORTEST * LAUNCHES.get(name, 1), moved / BANDWIDTH, flops / rate)

    def _refuse_mixed(self, name: str, args: Any, tensors: list[torch.Tensor]) -> None:
        plain = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
        assert not any(tensor.is_meta for tensor in plain), f"a tensor lost its values on the way to {name} at {_line()}"
        if name in INDEXING and isinstance(args[0], OnGpu):  # CUDA copies indices over
            plain = [tensor for tensor in plain if all(tensor is not index for index in args[1])]
        if any(tensor.dim() for tensor in plain):
            raise RuntimeError(f"Expected all tensors to be on the same device, found cuda:0 and cpu in {name} at {_line()}")


def _tensors(values: Any) -> list[torch.Tensor]:
    """All tensors in arguments or results. torch's own tree_flatten takes a third of the time that pretending costs."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes that lie in memory: an expanded dimension counts once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


def _host_memory(shape: Any, dtype: torch.dtype, _: torch.device) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


def _as_index(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, list) else value


def _on_gpu(value: Any) -> Any:
    return OnGpu(value) if isinstance(value, torch.Tensor) and not isinstance(value, OnGpu) else value


def _line() -> str:
    """The innermost line of the package on the stack."""
    frame = sys._getframe(2)
    while frame:
        if "/pipeline/" in frame.f_code.co_filename:
            return f"{frame.f_code.co_filename.split('/pipeline/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
