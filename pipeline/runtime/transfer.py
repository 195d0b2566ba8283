"""Copies batches to a device while the host goes on: from reused, pinned buffers."""

from collections.abc import Sequence

import torch


class HostBuffers:
    """Buffers of one shape, used in turn. One thread fills them, another sends them to the device."""

    def __init__(self, count: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device):
        self.device = device
        self.buffers = [_host_memory(shape, dtype, device) for _ in range(count)]
        self.sent: list[torch.cuda.Event | None] = [None] * count
        self.turn = -1

    def next(self) -> torch.Tensor:
        """The buffer to fill next, once its last content has arrived at the device."""
        self.turn = (self.turn + 1) % len(self.buffers)
        if event := self.sent[self.turn]:
            event.synchronize()
        return self.buffers[self.turn]

    def send(self, number: int) -> torch.Tensor:
        """A copy of content number `number`, counted from 0, on the device. The host does not wait for it."""
        place = number % len(self.buffers)
        copy = self.buffers[place].to(self.device, non_blocking=self.device.type == "cuda")
        self.sent[place] = _recorded(self.device)
        return copy


def _host_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory that a GPU reads by itself; from any other the host would have to copy."""
    return torch.empty(*shape, dtype=dtype, pin_memory=device.type == "cuda")


def _recorded(device: torch.device) -> torch.cuda.Event | None:
    """An event after everything that the device was asked for so far. Elsewhere than on CUDA, copies block."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
