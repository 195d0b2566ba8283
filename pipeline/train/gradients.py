"""The loss and its gradient in closed form: five matrix products, none of them for the biases (docs/method.md, "Gradients").

Shapes: B rows, D d_in, F d_sae.
"""

import torch

from pipeline.section import Dtype
from pipeline.study.recipe import Contrast
from pipeline.train.losses import Pass
from pipeline.train.pair_kernels import Gradients, Latents, contrastive
from pipeline.train.weights import Weights, factor, scratch


@torch.no_grad()
def closed_form(
    weights: Weights,
    x_BD: torch.Tensor,
    *,
    l1: float,
    contrast: Contrast | None,
    weight: float,
    threshold_F: torch.Tensor | None,
    precision: Dtype = "float32",
) -> Pass:
    """What `losses.differentiated` computes. The gradient lies in buffers that the next call in this thread overwrites.

    `threshold_F` comes from `pairs.thresholds` and is needed with a `contrast`. With `precision` bfloat16 the factors of the
    matrix products are rounded to it; sums, biases and everything per element keep the dtype of the weights.
    """
    rows = len(x_BD)
    W_enc_DF, b_enc_F, W_dec_FD, b_dec_D = weights.tensors()
    W_dec = factor("W_dec", W_dec_FD, precision)
    norm_F = row_norms(W_dec_FD)

    centred_BD = torch.sub(x_BD, b_dec_D, out=scratch("centred", x_BD, *x_BD.shape))
    centred = factor("centred", centred_BD, precision)
    f_BF = _product("f", centred, factor("W_enc", W_enc_DF, precision), x_BD).add_(b_enc_F).relu_()
    f = factor("f", f_BF, precision)
    residual_BD = _product("residual", f, W_dec, x_BD).sub_(centred_BD)
    reconstruction = torch.linalg.vector_norm(residual_BD).square() / rows
    f_sum_F = f_BF.sum(dim=0)
    fires_BF = torch.sign(f_BF, out=scratch("f_gradient", f_BF, *f_BF.shape))
    firings_F, firing_B = fires_BF.sum(dim=0), fires_BF.sum(dim=1)

    # From here on the residual is the gradient of the reconstruction x^.
    residual_BD.mul_(2 / rows)
    residual = factor("residual", residual_BD, precision)
    f_gradient_BF = _product("f_gradient", residual, W_dec.T, x_BD).add_(norm_F, alpha=l1 / rows)
    W_dec_gradient_FD = _product("W_dec_gradient", f.T, residual, x_BD)
    W_dec_gradient_FD.addcmul_(W_dec_FD, (f_sum_F / norm_F)[:, None], value=l1 / rows)
    penalty = None
    if contrast:
        assert threshold_F is not None
        latents = Latents(
            f_BF=f_BF, firing_B=firing_B, W_dec_FD=W_dec_FD, norm_F=norm_F, threshold_F=threshold_F, config=contrast
        )
        into = Gradients(f_BF=f_gradient_BF, W_dec_FD=W_dec_gradient_FD, weight=weight, precision=contrast.precision)
        penalty = contrastive(latents, into)
    # The backward kernel of ReLU: one pass over memory, where a mask and a product with it would be three.
    torch.ops.aten.threshold_backward.grad_input(f_gradient_BF, f_BF, 0, grad_input=f_gradient_BF)
    b_enc_gradient_F = f_gradient_BF.sum(dim=0)
    gradient = Weights(
        W_enc_DF=_product("W_enc_gradient", centred.T, factor("f_gradient", f_gradient_BF, precision), x_BD),
        b_enc_F=b_enc_gradient_F,
        W_dec_FD=W_dec_gradient_FD,
        # b_dec is added to x^ and taken from x: the sum over rows comes before the product with W_enc, not after it.
        b_dec_D=residual_BD.sum(dim=0) - torch.mv(W_enc_DF, b_enc_gradient_F),
    )
    return Pass(
        gradient=gradient,
        reconstruction=reconstruction,
        sparsity=torch.dot(f_sum_F, norm_F) / rows,
        contrast=penalty,
        residual_BD=residual_BD,
        firings_F=firings_F,
    )


def row_norms(W_dec_FD: torch.Tensor) -> torch.Tensor:
    """||w_i|| [F], never 0, so that it can be divided by."""
    return W_dec_FD.norm(dim=1).clamp_min_(1e-12)


def _product(name: str, one: torch.Tensor, other: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """one @ other in the dtype of `like`, in the buffer of that name."""
    shape = (one.shape[0], other.shape[1])
    total = scratch(name, like, *shape)
    if one.dtype == total.dtype:
        return torch.mm(one, other, out=total)
    return total.copy_(torch.mm(one, other, out=scratch(name, one, *shape)))
