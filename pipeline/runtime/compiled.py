"""Compiles functions of tensors for a GPU, and records what it does, so that the host need not ask for each kernel again.

Elsewhere than on CUDA nothing is compiled or recorded: functions run as they are written.
"""

import functools
import sys
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
    """Calls a function that works on the same memory every time: after a few calls on CUDA it is recorded, then replayed.

    The function must not wait for the device, and what it returns is lost. It is given with each call: kept here, it would
    keep its owner, and the memory of that, until the garbage collector comes.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._replay: Callable[[], object] | None = None

    def __call__(self, function: Callable[[], object], device: torch.device) -> None:
        """Do what the function does."""
        self._calls += 1
        if self._replay is None and device.type == "cuda" and self._calls > PLAIN_CALLS:
            self._replay = recorded(function)
        (self._replay or function)()


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
    """Whether torch can compile here: it needs Triton, a C compiler and Python's headers. Said once where it cannot."""
    try:
        torch.compile(torch.neg, dynamic=False)(torch.zeros(16, device="cuda"))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of torch, Triton, the C compiler or the driver
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"steps on the GPU are not compiled, and slower for it: {reason}", file=sys.stderr)
        return False
    return True


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
