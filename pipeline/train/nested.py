"""The gradient of a Matryoshka SAE, whose prefixes of latents each reconstruct alone, in blocks between their ends."""

import torch


def nested_gradients(residuals: list[torch.Tensor], rows: int) -> list[torch.Tensor]:
    """What each block of latents is differentiated through: the sum over the reconstructions that it is part of.

    `residuals` [B, D] are x^ - x of each prefix; the loss is the mean over prefixes and rows of their squares.
    """
    scale = 2 / (rows * len(residuals))
    gradients = [residuals[-1] * scale]
    for residual_BD in residuals[-2::-1]:
        gradients.append(torch.add(gradients[-1], residual_BD, alpha=scale))
    return gradients[::-1]


def joined(blocks: list[torch.Tensor]) -> torch.Tensor:
    """Blocks of latents in one tensor; a single one is not copied."""
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
