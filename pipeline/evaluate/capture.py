"""The bidirectional pair capture rate: of the pairs that fire together most, how many does the top-K mask select?

Defined in docs/method.md, "Pair capture". The rate says how well the mask aims at co-firing pairs: it must fall when the
penalty works, and is no score. Shapes: B rows, D d_in, F d_sae, n live latents.
"""

from typing import Any

import torch

from pipeline.experiment import EvaluateConfig
from pipeline.sae import SAE

NULL_SEED = 1_000_003
"""Seed of the random SAE, away from the small numbers that training seeds are: it must share no direction with them."""


class CoActivation:
    """How often and how strongly latents fire, alone and in pairs. `update`, then read the means."""

    def __init__(self, d_sae: int):
        self.rows = 0
        self.fired_F = torch.zeros(d_sae, dtype=torch.float64)
        self.joint_FF = torch.zeros(d_sae, d_sae)
        self.strength_FF = torch.zeros(d_sae, d_sae)

    def update(self, f_BF: torch.Tensor) -> None:
        """Take in the latents of some rows; with unit decoder rows a latent is its own strength."""
        fired_BF = (f_BF > 0).float()
        self.rows += len(f_BF)
        self.fired_F += fired_BF.sum(dim=0)
        self.joint_FF += fired_BF.T @ fired_BF  # exact: float32 counts to 2^24 rows
        self.strength_FF += f_BF.T @ f_BF


def topk_mask(direction_ND: torch.Tensor, fraction: float) -> torch.Tensor:
    """bool [n, n]: row i holds its k = max(1, round(fraction (n - 1))) most similar others, ties to the lower index."""
    latents = len(direction_ND)
    k = max(1, round(fraction * (latents - 1)))
    cosine_NN = (direction_ND @ direction_ND.T).fill_diagonal_(-torch.inf)
    nearest = cosine_NN.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros(latents, latents, dtype=torch.bool).scatter_(1, nearest, True)


def capture(W_dec_FD: torch.Tensor, seen: CoActivation, config: EvaluateConfig) -> dict[str, Any]:
    """Capture rates of one SAE.

    live: latents that fire on at least `live_firings` rows, n of them. Q: the n pairs of live latents with the largest mean
    product of strengths among those that fire together on at least `joint_firings` rows. row, column: share of Q, as ordered
    pairs, in the row's or column's top-K, which are equal because cosine is symmetric. union, mutual: share of Q in either
    or both; row = (union + mutual) / 2. chance: share of all live pairs in the union, which is what random labels capture.
    Where something is undefined the value is None and `reason` says why.
    """
    live = (seen.fired_F >= config.live_firings).nonzero().squeeze(1)
    n = len(live)
    undefined = dict.fromkeys(("row", "column", "union", "mutual", "chance", "lift", "kappa"))
    if n < 3:
        return undefined | {"live": n, "pairs": 0, "reason": f"{n} latents fire on {config.live_firings} rows or more"}
    top_NN = topk_mask(W_dec_FD[live], config.capture_topk)
    union_NN, mutual_NN = top_NN | top_NN.T, top_NN & top_NN.T
    upper_NN = torch.ones(n, n, dtype=torch.bool).triu(diagonal=1)
    chance = float(union_NN[upper_NN].double().mean())

    together_NN = (seen.joint_FF[live][:, live] >= config.joint_firings) & upper_NN
    row, column = together_NN.nonzero(as_tuple=True)
    if len(row) == 0:
        reason = f"no two latents fire together on {config.joint_firings} rows or more"
        return undefined | {"chance": chance, "live": n, "pairs": 0, "reason": reason}
    strongest = seen.strength_FF[live[row], live[column]].sort(descending=True, stable=True).indices[:n]
    row, column = row[strongest], column[strongest]
    union = float(union_NN[row, column].double().mean())
    return {
        "row": float((top_NN[row, column].double() + top_NN[column, row].double()).mean() / 2),
        "column": float((top_NN.T[row, column].double() + top_NN.T[column, row].double()).mean() / 2),
        "union": union,
        "mutual": float(mutual_NN[row, column].double().mean()),
        "chance": chance,
        "lift": union / chance,
        "kappa": (union - chance) / (1 - chance) if chance < 1 else None,
        "live": n,
        "pairs": len(row),
        "reason": None,
    }


def random_tied(sae: SAE, x_BD: torch.Tensor, l0: float) -> SAE:
    """An SAE of random unit directions, encoder tied, with the common bias that gives it the L0 `l0` on the rows `x_BD`.

    It keeps the trained b_dec, so that nothing but the directions is random. Similar encoder directions fire together by
    geometry alone: what this SAE's mask captures, no training had to teach.
    """
    d_sae, d_in = sae.W_dec_FD.shape
    generator = torch.Generator().manual_seed(NULL_SEED)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    projection = ((x_BD - sae.b_dec_D) @ W_dec_FD.T).flatten()
    firing = min(max(1, round(l0 * len(x_BD))), projection.numel() - 1)
    # The largest projection that must not fire any more.
    threshold = float(projection.kthvalue(projection.numel() - firing).values)
    return SAE(
        W_enc_DF=W_dec_FD.T,
        b_enc_F=torch.full((d_sae,), -threshold),
        W_dec_FD=W_dec_FD,
        b_dec_D=sae.b_dec_D,
    )
