"""The loss and its gradient in closed form: five matrix products, none of them for biases (docs/method.md, "Gradients").

With prefixes, two of them come in blocks of latents, and one more decodes all blocks but the first.
"""

from dataclasses import dataclass

import torch

from pipeline.runtime.linalg import vector_norm
from pipeline.sae.activation import ClosedForm
from pipeline.section import Dtype
from pipeline.train import auxk
from pipeline.train.auxk import AuxKTerm
from pipeline.train.losses import Differentiated, Objective
from pipeline.train.nested import nested_gradients
from pipeline.train.penalty import Accumulator, Latents
from pipeline.train.weights import Weights, decoder_norms, operand, product, scratch


@dataclass(frozen=True, kw_only=True)
class _Forward:
    """Results of the forward pass for the backward pass. `centred`, `f` and `W_dec` are operands of matrix products."""

    centred: torch.Tensor
    f: torch.Tensor
    W_dec: torch.Tensor
    latents: Latents
    residual_BD: torch.Tensor
    f_sum_F: torch.Tensor
    firings_F: torch.Tensor
    pre_Bk: torch.Tensor | None
    """Pre-activations of the latents that count as dead before the step."""


@torch.no_grad()
def closed_form(
    weights: Weights, x_BD: torch.Tensor, objective: Objective, *, precision: Dtype = "float32"
) -> Differentiated:
    """The same as `losses.differentiated`. The gradient lies in buffers that the next call in this thread overwrites.

    The activation must have a closed form, and the penalty must not rescale the encoder. With `precision` bfloat16 the
    operands of the matrix products are rounded to it; sums, biases and everything per element keep the dtype of the weights.
    """
    assert isinstance(objective.activation, ClosedForm)
    rows = len(x_BD)
    forward = _forward(weights, x_BD, objective, precision)
    f_sum_F, norm_F = forward.f_sum_F, forward.latents.norm_F
    terms = {
        "reconstruction": vector_norm(forward.residual_BD).square() / rows,
        "sparsity": torch.dot(f_sum_F, norm_F) / rows,
    }
    if objective.prefixes:
        terms["prefixes"], x_gradient_D, into = _nested(forward, objective, x_BD, precision)
    else:
        x_gradient_D, into = _whole(forward, objective, x_BD, precision)
    into.W_dec_FD.addcmul_(weights.W_dec_FD, (f_sum_F / norm_F)[:, None], value=objective.l1 / rows)
    if objective.penalty:
        terms[objective.penalty.name] = objective.penalty.add_gradient(forward.latents, into)
    objective.activation.backward_(into.f_BF, forward.latents.f_BF)
    if objective.auxk:
        terms["auxk"] = _add_auxk(objective.auxk, forward, weights, into, rows)
    b_enc_gradient_F = into.f_BF.sum(dim=0)
    gradient = Weights(
        W_enc_DF=product("W_enc_gradient", forward.centred.T, operand("f_gradient", into.f_BF, precision), x_BD),
        b_enc_F=b_enc_gradient_F,
        W_dec_FD=into.W_dec_FD,
        # b_dec is added to x^ and subtracted from x. Summing over rows first leaves a product with a vector, not a matrix.
        b_dec_D=x_gradient_D - torch.mv(weights.W_enc_DF, b_enc_gradient_F),
    )
    return Differentiated(gradient=gradient, terms=terms, residual_BD=forward.residual_BD, firings_F=forward.firings_F)


def _whole(
    forward: _Forward, objective: Objective, x_BD: torch.Tensor, precision: Dtype
) -> tuple[torch.Tensor, Accumulator]:
    """The gradients of reconstruction and sparsity for x^, summed over rows, and for latents and decoder.

    From here on `forward.residual_BD` holds the first for each row.
    """
    rows = len(x_BD)
    residual_BD = forward.residual_BD.mul_(2 / rows)
    residual = operand("residual", residual_BD, precision)
    into = Accumulator(
        f_BF=product("f_gradient", residual, forward.W_dec.T, x_BD).add_(forward.latents.norm_F, alpha=objective.l1 / rows),
        W_dec_FD=product("W_dec_gradient", forward.f.T, residual, x_BD),
        weight=objective.weight,
    )
    return residual_BD.sum(dim=0), into


def _nested(
    forward: _Forward, objective: Objective, x_BD: torch.Tensor, precision: Dtype
) -> tuple[torch.Tensor, torch.Tensor, Accumulator]:
    """The term of the prefixes, and what `_whole` returns, for that term; `forward.residual_BD` is scaled as there."""
    rows, blocks = len(x_BD), objective.blocks(len(forward.W_dec))
    residuals = [forward.residual_BD]
    for block in blocks[:0:-1]:
        decoded = forward.f[:, block] @ forward.W_dec[block]
        residuals.insert(0, residuals[0] - decoded.to(x_BD.dtype))
    gradients = nested_gradients(residuals, rows)
    term = torch.stack([vector_norm(each).square() / rows for each in residuals]).mean()
    forward.residual_BD.mul_(2 / rows)
    into = Accumulator(
        f_BF=scratch("f_gradient", x_BD, *forward.f.shape),
        W_dec_FD=scratch("W_dec_gradient", x_BD, *forward.W_dec.shape),
        weight=objective.weight,
    )
    for block, gradient_BD in zip(blocks, gradients, strict=True):
        gradient = operand("residual", gradient_BD, precision)
        into.f_BF[:, block] = gradient @ forward.W_dec[block].T
        into.W_dec_FD[block] = forward.f[:, block].T @ gradient
    into.f_BF.add_(forward.latents.norm_F, alpha=objective.l1 / rows)
    return term, gradients[0].sum(dim=0), into


def _add_auxk(term: AuxKTerm, forward: _Forward, weights: Weights, into: Accumulator, rows: int) -> torch.Tensor:
    """Add the gradient of AuxK, for which `into` holds that of pre-activations already; returns the term."""
    assert forward.pre_Bk is not None
    # residual_BD holds the gradient 2/B (x^ - x) by now.
    residual_BD = forward.residual_BD * (-rows / 2)
    found = auxk.differentiated(term, forward.pre_Bk, forward.firings_F, weights.W_dec_FD, residual_BD)
    into.f_BF[:, found.latent_k] += found.pre_Bk
    into.W_dec_FD[found.latent_k] += found.W_dec_kD
    return found.term


def _forward(weights: Weights, x_BD: torch.Tensor, objective: Objective, precision: Dtype) -> _Forward:
    activation = objective.activation
    assert isinstance(activation, ClosedForm)
    W_dec = operand("W_dec", weights.W_dec_FD, precision)
    centred_BD = torch.sub(x_BD, weights.b_dec_D, out=scratch("centred", x_BD, *x_BD.shape))
    centred = operand("centred", centred_BD, precision)
    encoded_BF = product("f", centred, operand("W_enc", weights.W_enc_DF, precision), x_BD)
    norm_F = decoder_norms(weights.W_dec_FD)
    encoded_BF.add_(weights.b_enc_F)
    pre_Bk = encoded_BF[:, objective.auxk.dead_F] if objective.auxk else None
    f_BF = activation.in_training_(encoded_BF, norm_F)
    activation.observe(f_BF, norm_F)
    f = operand("f", f_BF, precision)
    residual_BD = product("residual", f, W_dec, x_BD).sub_(centred_BD)
    # In the buffer that later holds the latents' gradient: it is free until then.
    fires_BF = torch.sign(f_BF, out=scratch("f_gradient", f_BF, *f_BF.shape))
    return _Forward(
        centred=centred,
        f=f,
        W_dec=W_dec,
        latents=Latents(f_BF=f_BF, firing_B=fires_BF.sum(dim=1), W_dec_FD=weights.W_dec_FD, norm_F=norm_F),
        residual_BD=residual_BD,
        f_sum_F=f_BF.sum(dim=0),
        firings_F=fires_BF.sum(dim=0),
        pre_Bk=pre_Bk,
    )
