"""What a training step does between its matrix products, as functions that a GPU runs in few passes over memory.

Together with the products they compute what `train/gradients.py` and the eager update in `train/step.py` do, and are tested
against both. `now` holds the values of `NOW` on the device: they change from step to step without the host.
"""

import torch

from pipeline.runtime.compiled import compiled
from pipeline.runtime.linalg import vecdot, vector_norm
from pipeline.sae.activation import ClosedForm

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of Adam."""
NOW = ("rate", "root", "l1", "step")
"""Learning rate over Adam's first bias correction, root of the second, weight of the sparsity term, number of the step."""
MEASURED = ("reconstruction", "sparsity", "fvu", "l0")
"""What every step measures, in the order in which it lies on the device."""
SMALLEST_NORM = 1e-12


@compiled
def variance(x_BD: torch.Tensor) -> torch.Tensor:
    """mean_b ||x_b - mean x||^2."""
    return x_BD.square().sum() / len(x_BD) - x_BD.mean(dim=0).square().sum()


@compiled
def centred(x_BD: torch.Tensor, b_dec_D: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x - b_dec as an operand of products."""
    return (x_BD - b_dec_D).to(dtype)


@compiled
def decoder(W_dec_FD: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoder as an operand of products, and its norms [F], above 0."""
    return W_dec_FD.to(dtype), vector_norm(W_dec_FD, dim=1).clamp_min(SMALLEST_NORM)


@compiled
def latents(
    pre_BF: torch.Tensor,
    b_enc_F: torch.Tensor,
    norm_F: torch.Tensor,
    activation: ClosedForm,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[torch.Tensor, ...]:
    """Latents in both dtypes, their mean over rows, and the number of rows that each fires on."""
    f_BF = activation.in_training_(pre_BF.float() + b_enc_F, norm_F)
    fires_BF = f_BF > 0
    return f_BF.to(dtypes[0]), f_BF.to(dtypes[1]), f_BF.sum(dim=0) / len(f_BF), fires_BF.sum(dim=0, dtype=torch.float32)


@compiled
def residual(
    decoded_BD: torch.Tensor, x_BD: torch.Tensor, b_dec_D: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient with respect to x^ as an operand of products, mean_b ||x^_b - x_b||^2, and the sum of the first over rows."""
    rows = len(x_BD)
    residual_BD = decoded_BD.float() - (x_BD - b_dec_D)
    gradient_BD = residual_BD * (2 / rows)
    return gradient_BD.to(dtype), residual_BD.square().sum() / rows, gradient_BD.sum(dim=0)


@compiled
def pre_gradient(
    gradient_BF: torch.Tensor,
    f_BF: torch.Tensor,
    norm_F: torch.Tensor,
    now: torch.Tensor,
    activation: ClosedForm,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the pre-activations from that of the latents without the sparsity term, and its sum over rows."""
    total_BF = gradient_BF.float() + now[2] / len(f_BF) * norm_F
    activation.backward_(total_BF, f_BF)
    return total_BF.to(dtype), total_BF.sum(dim=0)


@compiled
def update_decoder(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    gradient_FD: torch.Tensor,
    along_F: torch.Tensor | None,
    f_mean_F: torch.Tensor,
    norm_F: torch.Tensor,
    now: torch.Tensor,
    unit: bool,
) -> None:
    """Adam's step on the decoder and its moments. `unit`: along the sphere, and back onto it.

    To the gradient come `along_F` times the rows, and that of the sparsity term.
    """
    W_dec_FD, first_FD, second_FD = tensors
    along = now[2] * f_mean_F / norm_F if along_F is None else along_F + now[2] * f_mean_F / norm_F
    total_FD = gradient_FD.float() + W_dec_FD * along[:, None]
    if unit:
        unit_FD = W_dec_FD / norm_F[:, None]
        total_FD = total_FD - vecdot(total_FD, unit_FD)[:, None] * unit_FD
    moved_FD = _adam(W_dec_FD, first_FD, second_FD, total_FD, now)
    if unit:
        moved_FD = moved_FD / vector_norm(moved_FD, dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
    W_dec_FD.copy_(moved_FD)


@compiled
def update(
    weight: torch.Tensor, first: torch.Tensor, second: torch.Tensor, gradient: torch.Tensor, now: torch.Tensor
) -> None:
    """Adam's step on another tensor and its moments."""
    weight.copy_(_adam(weight, first, second, gradient.float(), now))


@compiled
def note(
    last_fired_F: torch.Tensor,
    measured: torch.Tensor,
    firings_F: torch.Tensor,
    f_mean_F: torch.Tensor,
    norm_F: torch.Tensor,
    scalars: tuple[torch.Tensor, torch.Tensor],
    now: torch.Tensor,
    rows: int,
) -> None:
    """Note which latents fired, and the measurements of `MEASURED`, given reconstruction term and variance."""
    last_fired_F.copy_(torch.where(firings_F > 0, now[3].long(), last_fired_F))
    reconstruction, spread = scalars
    sparsity, l0 = (f_mean_F * norm_F).sum(), firings_F.sum() / rows
    measured.copy_(torch.stack([reconstruction, sparsity, reconstruction / spread, l0]))


def _adam(
    weight: torch.Tensor, first: torch.Tensor, second: torch.Tensor, gradient: torch.Tensor, now: torch.Tensor
) -> torch.Tensor:
    first.lerp_(gradient, 1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    return weight - now[0] * first / (second.sqrt() / now[1] + EPSILON)
