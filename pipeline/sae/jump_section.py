"""Defines the section [train.jumprelu]."""

from typing import Literal

from pydantic import PositiveFloat

from pipeline.section import Section


class Jump(Section):
    """How the thresholds of JumpReLU are learned. Lengths are in the unit of activations scaled to E||x||^2 = 1."""

    sparsity: Literal["step", "tanh", "quadratic"] = "step"
    """The term that `l1` weighs: L0; its smooth stand-in by tanh; or the squared relative distance to `l0_target`."""
    bandwidth: PositiveFloat = 0.001
    """Width of the window around a threshold in which latents move it."""
    threshold: PositiveFloat = 0.001
    """Where thresholds begin."""
    tanh_scale: PositiveFloat = 4.0
    """Factor on a latent's strength inside tanh."""
