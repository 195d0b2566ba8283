"""Re-initialisation of dead latents, after Bricken et al. 2023 (docs/method.md, "Dead-latent resets").

Shapes: B rows, D d_in, F d_sae.
"""

import torch

from pipeline.study.recipe import TrainConfig
from pipeline.train.weights import Weights

ENCODER_SHARE = 0.2
"""Encoder norm of a reset latent, as a share of the mean encoder norm of the living: small, so that it starts quietly."""
INITIAL_ENCODER_NORM = 0.1
"""What stands in for that mean when no latent is alive: the norm that training began with."""


def reset_due(done: int, config: TrainConfig) -> bool:
    """Whether latents are to be reset after `done` steps.

    Never within the last `every` steps: a latent reset there would have no time to become anything.
    """
    resets = config.resets
    if resets is None or done < resets.first or done + resets.every > config.steps:
        return False
    return (done - resets.first) % resets.every == 0


@torch.no_grad()
def reset_dead(
    weights: Weights, dead_F: torch.Tensor, residual_BD: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Point dead latents at what is reconstructed worst; returns the indices that were reset.

    Each gets the direction of a residual x - x^ drawn, without repetition, with a probability proportional to the square of
    its loss ||x - x^||^2. At most B latents are reset at once; the others wait for the next time.
    """
    loss_B = residual_BD.square().sum(dim=1).double()
    drawable = int((loss_B > 0).sum())
    dead = dead_F.nonzero().squeeze(1)[:drawable]
    if len(dead) == 0:
        return dead
    # Divided by the largest first, so that the square cannot overflow.
    drawn = torch.multinomial((loss_B / loss_B.max()).square(), len(dead), generator=generator)
    direction_KD = torch.nn.functional.normalize(residual_BD[drawn], dim=1)
    alive_F = ~dead_F
    norm = weights.W_enc_DF[:, alive_F].norm(dim=0).mean() if alive_F.any() else torch.tensor(INITIAL_ENCODER_NORM)
    weights.W_dec_FD[dead] = direction_KD
    weights.W_enc_DF[:, dead] = direction_KD.T * (ENCODER_SHARE * norm)
    weights.b_enc_F[dead] = 0
    return dead
