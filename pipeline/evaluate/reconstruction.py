"""How well an SAE reconstructs held-out rows, and how many latents it takes.

Shapes: B rows, D d_in, F d_sae.
"""

import torch

from pipeline.sae import SAE


class Reconstruction:
    """Sums over rows, so that every ratio is a ratio of sums and no average of ratios. `update`, then `compute`."""

    def __init__(self, sae: SAE):
        self.sae = sae
        d_sae, d_in = sae.W_dec_FD.shape
        self.rows = 0
        self.squared_error = torch.zeros((), dtype=torch.float64)
        self.squared_norm = torch.zeros((), dtype=torch.float64)
        self.cosine = torch.zeros((), dtype=torch.float64)
        self.sum_D = torch.zeros(d_in, dtype=torch.float64)
        self.fired_F = torch.zeros(d_sae, dtype=torch.int64)

    def update(self, x_BD: torch.Tensor, f_BF: torch.Tensor) -> None:
        """Take in rows and their latents."""
        reconstructed_BD = self.sae.decode(f_BF)
        self.rows += len(x_BD)
        self.squared_error += (x_BD - reconstructed_BD).square().sum(dtype=torch.float64)
        self.squared_norm += x_BD.square().sum(dtype=torch.float64)
        self.cosine += torch.nn.functional.cosine_similarity(x_BD, reconstructed_BD).sum(dtype=torch.float64)
        self.sum_D += x_BD.sum(dim=0, dtype=torch.float64)
        self.fired_F += (f_BF > 0).sum(dim=0)

    def compute(self) -> dict[str, float]:
        """The metrics, over all rows seen.

        fvu: squared error over variance around the mean row, 0 is perfect and 1 is predicting the mean. cosine: mean cosine
        of row and reconstruction. l0: mean number of latents that fire on a row. dead_fraction: share of latents that fired
        on none. max_decoder_cosine: mean over latents of the largest cosine to another latent's decoder direction.
        """
        variance = self.squared_norm - self.sum_D.square().sum() / self.rows
        cosines_FF = (self.sae.W_dec_FD @ self.sae.W_dec_FD.T).fill_diagonal_(-1)
        return {
            "rows": self.rows,
            "fvu": float(self.squared_error / variance),
            "cosine": float(self.cosine / self.rows),
            "l0": float(self.fired_F.sum() / self.rows),
            "dead_fraction": float((self.fired_F == 0).double().mean()),
            "max_decoder_cosine": float(cosines_FF.max(dim=1).values.mean()),
        }
