"""Re-initialises dead latents, after Bricken et al. 2023 (docs/method.md, "Dead-latent resets")."""

import torch

from pipeline.errors import DivergedSAEError
from pipeline.runtime.linalg import vector_norm
from pipeline.study.recipe import TrainConfig
from pipeline.train.weights import Weights

ENCODER_SHARE = 0.2
"""Encoder norm of a reset latent over the mean encoder norm of the live ones: small, so that it fires weakly at first."""
INITIAL_ENCODER_NORM = 0.1
"""Used for that mean when no latent is alive: the norm at initialisation."""


def reset_due(done: int, config: TrainConfig) -> bool:
    """True if dead latents are reset after `done` steps.

    Never within the last `every` steps: a latent reset there would have no time to learn.
    """
    resets = config.resets
    if resets is None or done < resets.first or done + resets.every > config.steps:
        return False
    return (done - resets.first) % resets.every == 0


@torch.no_grad()
def reset_dead(
    weights: Weights, dead_F: torch.Tensor, residual_BD: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Point dead latents at the worst reconstructed rows; returns the indices [K] of the latents that were reset.

    Each latent gets the direction of one residual x - x^. Residuals are drawn without replacement, with probability
    proportional to ||x - x^||^4. At most B latents are reset at once; the rest wait for the next reset.
    Raises DivergedSAEError for residuals without a direction to draw.
    """
    loss_B = residual_BD.square().sum(dim=1).double()
    drawable = int((loss_B > 0).sum())
    dead = dead_F.nonzero().squeeze(1)[:drawable]
    if len(dead) == 0:
        return dead
    if not loss_B.isfinite().all():
        raise DivergedSAEError("loss not finite at a reset of dead latents, lower train.learning_rate")
    # Divided by the largest, so that the square cannot overflow.
    drawn = torch.multinomial((loss_B / loss_B.max()).square(), len(dead), generator=generator)
    direction_KD = torch.nn.functional.normalize(residual_BD[drawn], dim=1)
    alive_F = ~dead_F
    alive_norm_F = vector_norm(weights.W_enc_DF[:, alive_F], dim=0)
    norm = alive_norm_F.mean() if alive_F.any() else torch.tensor(INITIAL_ENCODER_NORM)
    weights.W_dec_FD[dead] = direction_KD
    weights.W_enc_DF[:, dead] = direction_KD.T * (ENCODER_SHARE * norm)
    weights.b_enc_F[dead] = 0
    return dead
