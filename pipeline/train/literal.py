"""Computes the penalty as it was first written down, so that a study can show what it does (docs/method.md, `literal`)."""

import torch

from pipeline.train.penalty import PenaltyTerm


class LiteralTerm(PenaltyTerm):
    """sum_b sum_ij M_ij C_ij f_bi f_bj, with decoder norms multiplied into the encoder."""

    name = "contrast"
    rescales_encoder = True

    def definition(self, f_BF: torch.Tensor, W_dec_FD: torch.Tensor) -> torch.Tensor:
        """The penalty of a batch, a scalar.

        It is summed over rows and ordered pairs, the diagonal included: its cosine is the largest of every row, so it is in
        every top K.
        """
        direction_FD = torch.nn.functional.normalize(W_dec_FD, dim=1)
        cosine_FF = direction_FD @ direction_FD.T
        k = max(1, int(self.section.topk * len(cosine_FF)))
        row_FF = (cosine_FF >= cosine_FF.topk(k, dim=1).values[:, -1:]).detach()
        return ((row_FF | row_FF.T) * cosine_FF * (f_BF.T @ f_BF)).sum()

    def encoder_scale(self, norm_F: torch.Tensor) -> torch.Tensor:
        """The decoder norms."""
        return norm_F
