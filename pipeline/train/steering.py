"""Steers the sparsity weight during training, so that L0 ends at a target."""

import math

import torch

EVERY = 50
"""Steps whose mean L0 decides a correction."""
GAIN, TREND = 0.3, 0.02
"""How much of log(L0 / target) a correction adds to the logarithm of the weight, and to what all later corrections add.
The second is for L0 that drifts as long as the SAE learns: without it, L0 stays off by the drift."""
MOST = math.log(2)
"""Largest error that one correction looks at: L0 may be 0 for a while."""


FURTHEST = math.log(1e8)
"""Largest change of the logarithm: a target that cannot be reached must not let the weight run away."""


class Steering:
    """The sparsity weight of one SAE as a multiple of its `l1`."""

    def __init__(self, target: float, device: torch.device):
        self.target = target
        self.logarithm = self.trend = 0.0
        """Of the factor, and what every correction adds to it."""
        self.l0_sum = torch.zeros((), device=device)
        """Of the steps since the last correction."""

    @property
    def factor(self) -> float:
        """What to multiply `l1` by."""
        return math.exp(self.logarithm)

    def observe(self, l0: torch.Tensor, done: int) -> None:
        """Take note of the L0 of a step, after `done` steps. Waits for the device once in EVERY steps."""
        self.l0_sum += l0
        if done % EVERY == 0:
            ratio = max(float(self.l0_sum) / EVERY / self.target, 1e-9)
            error = min(max(math.log(ratio), -MOST), MOST)
            if abs(error) < MOST:  # far from the target, it would grow for long and overshoot
                self.trend += TREND * error
            self.logarithm = min(max(self.logarithm + GAIN * error + self.trend, -FURTHEST), FURTHEST)
            self.l0_sum.zero_()

    def state(self) -> dict[str, torch.Tensor]:
        """All mutable state, by name."""
        steered = torch.tensor([self.logarithm, self.trend], dtype=torch.float64)
        return {"steered": steered, "l0_sum": self.l0_sum}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state()` returned. The argument also holds the entries of the `Trainer`."""
        self.logarithm, self.trend = map(float, state["steered"])
        self.l0_sum.copy_(state["l0_sum"])
