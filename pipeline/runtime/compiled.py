"""Compiles functions of tensors for a GPU, and records what it does, so that the host need not ask for each kernel again.

Elsewhere than on CUDA nothing is compiled or recorded: functions run as they are written.
"""

import functools
import importlib.util
import shutil
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")

PLAIN_CALLS = 3
"""Calls of a function before it is recorded: what it calls for the first time is compiled and set up then."""
MOST_SHAPES = 64
"""Shapes that one function is compiled for before torch gives up and runs it as it is written."""


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function, compiled for tensors on CUDA: a few kernels instead of one for each operation.

    Its first argument is a tensor or begins with one; every argument without tensors is a constant of the compiled code.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = cast("torch.Tensor | tuple[torch.Tensor, ...]", args[0])
        if (first[0] if isinstance(first, tuple) else first).device.type != "cuda" or not can_compile():
            return function(*args, **kwargs)
        return run(function, *args, **kwargs)

    return call


def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the compiled function."""
    return _for_cuda(function)(*args, **kwargs)


class Replayed:
    """A function that works on the same memory in every call: after a few calls on CUDA it is recorded, then replayed.

    It must not wait for the device. What it returns is lost.
    """

    def __init__(self, function: Callable[[], object], device: torch.device):
        self.function, self.on_gpu = function, device.type == "cuda"
        self.calls = 0
        self.replay: Callable[[], object] | None = None

    def __call__(self) -> None:
        """Do what the function does."""
        self.calls += 1
        if self.replay is None and self.on_gpu and self.calls > PLAIN_CALLS:
            self.replay = recorded(self.function)
        (self.replay or self.function)()


def recorded(function: Callable[[], Any]) -> Callable[[], object]:
    """What the function makes the GPU do, as a CUDA graph: calling the result does it again, on the same memory.

    Recording executes nothing. The function must not wait for the device, and what it returns is lost.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile: those that read batches.
    with torch.cuda.graph(graph, pool=_first_recording().pool(), capture_error_mode="thread_local"):
        function()
    return graph.replay


@functools.cache
def can_compile() -> bool:
    """Whether Triton is installed, and the C compiler that it needs."""
    return importlib.util.find_spec("triton") is not None and any(map(shutil.which, ("cc", "gcc", "clang")))


@functools.cache
def _for_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._dynamo

    torch._dynamo.config.recompile_limit = MOST_SHAPES
    # Deterministic: otherwise it may choose between kernels that round differently by timing them.
    return torch.compile(function, fullgraph=True, dynamic=False, options={"deterministic": True})


@functools.cache
def _first_recording() -> torch.cuda.CUDAGraph:
    """A recording that is kept: memory that no recording uses any more cannot be shared again.

    All recordings share it. They run one after another, and nothing of one is used after the next begins.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        torch.zeros((), device="cuda")
    return graph
