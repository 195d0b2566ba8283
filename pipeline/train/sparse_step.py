"""The loss and its gradient where few latents fire on a row: one dense product, the encoder's; all others skip the zeros.

For activations that fix L0, on a CPU (docs/method.md, "Gradients"). Local shape: n, firings of the batch, row by row.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from pipeline.runtime.compatibility import without_sparse_warning
from pipeline.runtime.linalg import vector_norm
from pipeline.sae.activation import ClosedForm
from pipeline.section import Dtype
from pipeline.train import auxk
from pipeline.train.losses import Differentiated, Objective
from pipeline.train.nested import joined, nested_gradients
from pipeline.train.penalty import Accumulator, Latents
from pipeline.train.weights import Weights, decoder_norms, operand, product, scratch

without_sparse_warning()
DENSEST = 0.1
"""Share of the latents that fire from which on dense products are faster."""


@dataclass(frozen=True, kw_only=True)
class Firings:
    """Where latents fire in a batch: a sparse matrix [B, F] by rows, and the order of its numbers by columns."""

    rows: int
    latents: int
    latent_n: torch.Tensor
    starts_B: torch.Tensor
    """The first firing of each row, and one past the last of all: [B + 1]."""
    row_n: torch.Tensor
    by_latent_n: torch.Tensor
    """The order that sorts the firings by latent."""
    starts_F: torch.Tensor
    """As `starts_B`, in that order: [F + 1]."""

    @classmethod
    def of(cls, f_BF: torch.Tensor) -> "Firings":
        """Of latents, on a CPU."""
        rows, latents = f_BF.shape
        numbers = cast("npt.NDArray[np.float32]", f_BF.numpy())
        place_n = np.flatnonzero(numbers)
        row_n, latent_n = np.divmod(place_n, latents)
        by_latent_n = np.argsort(latent_n, kind="stable")
        return cls(
            rows=rows,
            latents=latents,
            latent_n=torch.from_numpy(latent_n),
            starts_B=_starts(row_n, rows),
            row_n=torch.from_numpy(row_n),
            by_latent_n=torch.from_numpy(by_latent_n),
            starts_F=_starts(latent_n, latents),
        )

    @property
    def count_F(self) -> torch.Tensor:
        """Rows on which each latent fires."""
        return self.starts_F.diff()

    def times(self, value_n: torch.Tensor, matrix_FD: torch.Tensor) -> torch.Tensor:
        """The sparse matrix of these values times a dense one."""
        offsets_B = self.starts_B[:-1]
        return torch.nn.functional.embedding_bag(self.latent_n, matrix_FD, offsets_B, mode="sum", per_sample_weights=value_n)

    def transposed_times(self, value_n: torch.Tensor, matrix_BD: torch.Tensor) -> torch.Tensor:
        """Its transpose times a dense one."""
        offsets_F = self.starts_F[:-1]
        row_n, value_n = self.row_n[self.by_latent_n], value_n[self.by_latent_n]
        return torch.nn.functional.embedding_bag(row_n, matrix_BD, offsets_F, mode="sum", per_sample_weights=value_n)

    def sampled(self, left_BD: torch.Tensor, right_FD: torch.Tensor) -> torch.Tensor:
        """left @ right^T where latents fire, [n]."""
        size = (self.rows, self.latents)
        zeros_n = left_BD.new_zeros(len(self.latent_n))
        where = torch.sparse_csr_tensor(self.starts_B, self.latent_n, zeros_n, size, check_invariants=False)
        return cast("torch.Tensor", torch.sparse.sampled_addmm(where, left_BD, right_FD.T, beta=0.0).values())

    def summed(self, value_n: torch.Tensor) -> torch.Tensor:
        """Sums over the rows, [F]."""
        return value_n.new_zeros(self.latents).index_add_(0, self.latent_n, value_n)


def _starts(index_n: npt.NDArray[np.int64], size: int) -> torch.Tensor:
    """How many of the indices are below 0, 1, ..., size."""
    counts = np.bincount(index_n, minlength=size)
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))


def is_sparse(weights: Weights, objective: Objective, k: int | None) -> bool:
    """Whether the sparse form is the faster one."""
    on_cpu = weights.b_enc_F.device.type == "cpu"
    return on_cpu and objective.activation.fixes_l0 and k is not None and k < DENSEST * len(weights.b_enc_F)


@torch.no_grad()
def sparse_form(
    weights: Weights, x_BD: torch.Tensor, objective: Objective, *, precision: Dtype = "float32"
) -> Differentiated:
    """The same as `losses.differentiated`, for an activation that fixes L0 and in closed form.

    With `precision` bfloat16 the operands of the encoder's product are rounded to it; the other products stay exact.
    """
    activation, rows = objective.activation, len(x_BD)
    assert isinstance(activation, ClosedForm)
    norm_F = decoder_norms(weights.W_dec_FD)
    centred_BD = torch.sub(x_BD, weights.b_dec_D, out=scratch("centred", x_BD, *x_BD.shape))
    centred, W_enc = operand("centred", centred_BD, precision), operand("W_enc", weights.W_enc_DF, precision)
    pre_BF = product("f", centred, W_enc, x_BD).add_(weights.b_enc_F)
    pre_Bk = pre_BF[:, objective.auxk.dead_F] if objective.auxk else None
    f_BF = activation.in_training_(pre_BF, norm_F)
    activation.observe(f_BF, norm_F)
    blocks = [_Block.of(f_BF, latents) for latents in objective.blocks(len(norm_F))]
    residuals = _residuals(blocks, centred_BD, weights.W_dec_FD)
    count_F = joined([block.fires.count_F for block in blocks])
    f_sum_F = joined([block.fires.summed(block.f_n) for block in blocks])
    terms = {
        "reconstruction": vector_norm(residuals[-1]).square() / rows,
        "sparsity": torch.dot(f_sum_F, norm_F) / rows,
    }
    if objective.prefixes:
        terms["prefixes"] = torch.stack([vector_norm(each).square() / rows for each in residuals]).mean()
    gradients = nested_gradients(residuals, rows)
    W_dec_gradient_FD = joined(
        [block.fires.transposed_times(block.f_n, each) for block, each in zip(blocks, gradients, strict=True)]
    )
    f_gradient_BF = None
    if objective.penalty:
        f_gradient_BF = scratch("f_gradient", f_BF, *f_BF.shape).zero_()
        into = Accumulator(f_BF=f_gradient_BF, W_dec_FD=W_dec_gradient_FD, weight=objective.weight)
        firing_B = torch.stack([block.fires.starts_B.diff() for block in blocks]).sum(dim=0).to(f_BF.dtype)
        latents = Latents(f_BF=f_BF, firing_B=firing_B, W_dec_FD=weights.W_dec_FD, norm_F=norm_F)
        terms[objective.penalty.name] = objective.penalty.add_gradient(latents, into)
    encoders = [
        block.encoder_gradients(each, weights.W_dec_FD, f_gradient_BF, centred_BD)
        for block, each in zip(blocks, gradients, strict=True)
    ]
    b_enc_gradient_F = joined([bias for bias, _ in encoders])
    W_enc_gradient_DF = joined([matrix for _, matrix in encoders]).T.contiguous()
    if objective.auxk and pre_Bk is not None:
        found = auxk.differentiated(objective.auxk, pre_Bk, count_F, weights.W_dec_FD, residuals[-1].neg())
        terms["auxk"] = found.term
        W_dec_gradient_FD[found.latent_k] += found.W_dec_kD
        W_enc_gradient_DF[:, found.latent_k] += centred_BD.T @ found.pre_Bk
        b_enc_gradient_F[found.latent_k] += found.pre_Bk.sum(dim=0)
    gradient = Weights(
        W_enc_DF=W_enc_gradient_DF,
        b_enc_F=b_enc_gradient_F,
        W_dec_FD=W_dec_gradient_FD,
        b_dec_D=gradients[0].sum(dim=0) - torch.mv(weights.W_enc_DF, b_enc_gradient_F),
    )
    return Differentiated(gradient=gradient, terms=terms, residual_BD=residuals[-1], firings_F=count_F.to(f_BF.dtype))


@dataclass(frozen=True, kw_only=True)
class _Block:
    """The firings of some latents: of all, or of those that a prefix adds."""

    latents: slice
    fires: Firings
    f_n: torch.Tensor

    @classmethod
    def of(cls, f_BF: torch.Tensor, latents: slice) -> "_Block":
        fires = Firings.of(f_BF[:, latents])
        return cls(latents=latents, fires=fires, f_n=f_BF[:, latents][fires.row_n, fires.latent_n])

    def encoder_gradients(
        self, gradient_BD: torch.Tensor, W_dec_FD: torch.Tensor, penalty_BF: torch.Tensor | None, centred_BD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the biases and, transposed, of W_enc.

        `gradient_BD` is that of the reconstructions which these latents are part of, `penalty_BF` the penalty's for latents.
        """
        h_n = self.fires.sampled(gradient_BD, W_dec_FD[self.latents])
        if penalty_BF is not None:
            h_n += penalty_BF[:, self.latents][self.fires.row_n, self.fires.latent_n]
        return self.fires.summed(h_n), self.fires.transposed_times(h_n, centred_BD)


def _residuals(blocks: list[_Block], centred_BD: torch.Tensor, W_dec_FD: torch.Tensor) -> list[torch.Tensor]:
    """x^ - x from the latents of the first block, of the first two, and so on."""
    residuals = [blocks[0].fires.times(blocks[0].f_n, W_dec_FD[blocks[0].latents]).sub_(centred_BD)]
    for block in blocks[1:]:
        residuals.append(block.fires.times(block.f_n, W_dec_FD[block.latents]).add_(residuals[-1]))
    return residuals
