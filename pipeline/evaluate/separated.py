"""Finds what became, in an arm with a penalty, of the pairs of latents that interfere most in its control.

Defined in docs/method.md, "Separated pairs". It is there to be looked at: drift separates pairs, too.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch

from pipeline.evaluate.bench import Bench, LayerBench
from pipeline.evaluate.examples import HeldoutText, strongest_rows
from pipeline.evaluate.heldout import Latents
from pipeline.evaluate.pairs import TopPairs, pair_blocks
from pipeline.evaluate.reconstruction import Reconstruction, measure_reconstruction
from pipeline.evaluate.sparse import SparseLatents
from pipeline.runtime.linalg import vecdot
from pipeline.sae.finished import open_sae
from pipeline.sae.sae import SAE
from pipeline.study.evaluations import Need
from pipeline.study.planned import PlannedSAE

PAIRS = 100
"""Pairs of the control that are followed: those with the largest interference."""
LEFT = 0.25
"""A pair is separated when less than this share of its interference is left and both latents are still live."""
IN_PLACE = 0.7
"""Cosine of a latent's direction to its direction in the control from which on it is in place: within 45 degrees."""
SHOWN = 5
"""Separated pairs that are shown with texts."""
CONTEXTS, AROUND = 3, 8
"""Texts of a pair and of each of its latents, and tokens shown on either side of the one on which they fire."""


@dataclass(frozen=True, kw_only=True)
class PairsIn:
    """Pairs of latents as they are in one SAE, on held-out rows."""

    direction_P2D: torch.Tensor
    joint_P: torch.Tensor
    """Rows on which both fire."""
    co_activation_P: torch.Tensor
    """2 sum a_i a_j over rows, relative to the SAE's sum of ||x^ - b_dec||^2."""

    @property
    def cosine_P(self) -> torch.Tensor:
        """Of the two directions."""
        return vecdot(self.direction_P2D[:, 0], self.direction_P2D[:, 1])

    @property
    def interference_P(self) -> torch.Tensor:
        """Cosine times co-activation."""
        return self.cosine_P * self.co_activation_P


@dataclass(frozen=True, kw_only=True)
class Control:
    """The pairs of an SAE without a penalty that interfere most."""

    pair_P2: torch.Tensor
    pairs: PairsIn
    together: list[list[tuple[int, float]]]
    """For each pair rows on which both fire, with the product of both, strongest first."""


def interfering(sae: SAE, latents: Callable[[], Iterable[SparseLatents]], joint_firings: int) -> torch.Tensor:
    """The PAIRS pairs [P, 2] with the largest C_ij sum a_i a_j, largest first, or all above 0 if they are fewer.

    `latents()` gives the chunks of all rows. Pairs that fire together on fewer than `joint_firings` rows are left out.
    """
    top = TopPairs(PAIRS, sae.device)
    for block in pair_blocks(latents, sae.d_sae, sae.device):
        score_bF = (sae.W_dec_FD[block.latents] @ sae.W_dec_FD.T).mul_(block.strength_bF)
        # Not `score_bF <= 0`: what is not a number is left out, too.
        top.offer(block, score_bF.masked_fill_(~(score_bF > 0) | (block.joint_bF < joint_firings), -torch.inf))
    return top.pair_P2


def products(latents: Iterable[torch.Tensor], pair_P2: torch.Tensor) -> Iterator[torch.Tensor]:
    """a_i a_j of each pair, [B, P], from chunks of latents [B, F]."""
    return (f_BF[:, pair_P2[:, 0]] * f_BF[:, pair_P2[:, 1]] for f_BF in latents)


def pairs_in(sae: SAE, latents: Iterable[torch.Tensor], pair_P2: torch.Tensor, reconstructed: torch.Tensor) -> PairsIn:
    """Measure pairs in an SAE, from chunks of its latents [B, F] and its sum over rows of ||x^ - b_dec||^2."""
    joint_P = torch.zeros(len(pair_P2), dtype=torch.int64, device=sae.device)
    strength_P = torch.zeros(len(pair_P2), dtype=torch.float64, device=sae.device)
    for product_BP in products(latents, pair_P2):
        joint_P += (product_BP > 0).sum(dim=0)
        strength_P += product_BP.sum(dim=0, dtype=torch.float64)
    co_activation_P = 2 * strength_P / reconstructed
    return PairsIn(direction_P2D=sae.W_dec_FD[pair_P2], joint_P=joint_P, co_activation_P=co_activation_P)


class Controls:
    """The controls of a layer's SAEs. Several arms share one; each is measured once."""

    def __init__(self, layer: LayerBench):
        self.layer = layer
        self._found: dict[str, Control] = {}

    def of(self, planned: PlannedSAE) -> Control:
        """One of them. Raises CorruptArtefactError if it is damaged."""
        path = planned.artefact.path
        if path not in self._found:
            sae = open_sae(planned.artefact, self.layer.workspace).to(self.layer.device)
            self._found[path] = self._measured(sae)
        return self._found[path]

    def _measured(self, sae: SAE) -> Control:
        latents, seen = Latents(sae, self.layer.rows), Reconstruction(sae)
        for x_BD, of_chunk in latents.with_rows():
            seen.update(x_BD, of_chunk)
        pair_P2 = interfering(sae, latents.sparse, self.layer.experiment.evaluate.joint_firings)
        if not seen.reconstructed.isfinite():
            pair_P2 = pair_P2[:0]  # a degenerate SAE has no pairs to follow
        return Control(
            pair_P2=pair_P2,
            pairs=pairs_in(sae, latents, pair_P2, seen.reconstructed),
            together=strongest_rows(products(latents, pair_P2), len(pair_P2)),
        )


@dataclass(frozen=True, kw_only=True)
class Followed:
    """What became of the control's pairs in an arm."""

    same_P2: torch.Tensor
    """Cosine of each latent's direction to its direction in the control."""
    lost_P: torch.Tensor
    """Pairs of which a latent is no longer live."""
    separated_P: torch.Tensor
    in_place_P: torch.Tensor
    """Those of the separated pairs whose latents are both in place."""
    most: list[int]
    """Places of the SHOWN separated pairs whose interference fell most, most first."""


def follow(before: PairsIn, after: PairsIn, live_P: torch.Tensor) -> Followed:
    """Compare pairs in the control with the same pairs in an arm; `live_P` says whether both latents are live there."""
    same_P2 = vecdot(before.direction_P2D, after.direction_P2D)
    separated_P = live_P & (after.interference_P < LEFT * before.interference_P)
    fall_P = (before.interference_P - after.interference_P).masked_fill(~separated_P, -torch.inf)
    order_P = fall_P.sort(descending=True, stable=True).indices
    return Followed(
        same_P2=same_P2,
        lost_P=~live_P,
        separated_P=separated_P,
        in_place_P=separated_P & (same_P2 >= IN_PLACE).all(dim=1),
        most=cast("list[int]", order_P[: min(SHOWN, int(separated_P.sum()))].tolist()),
    )


def compute(on: Bench) -> dict[str, Any]:
    """The content of `separated.json` (docs/evaluation-files.md)."""
    control, seen = on.layer.once(Controls).of(on.control), on.once(measure_reconstruction)
    before, pair_P2 = control.pairs, control.pair_P2
    after = pairs_in(on.sae, on.latents, pair_P2, seen.reconstructed)
    followed = follow(before, after, (seen.fired_F[pair_P2] >= on.config.live_firings).all(dim=1))
    together = f"point the same way and fire together on {on.config.joint_firings} rows or more"
    return {
        "control": on.control.arm,
        "pairs": len(pair_P2),
        "separated": int(followed.separated_P.sum()),
        "in_place": int(followed.in_place_P.sum()),
        "lost": int(followed.lost_P.sum()),
        "before": float(before.interference_P.sum()),
        "after": float(after.interference_P.sum()),
        "shown": _shown(on, control, after, followed),
        "reason": None if len(pair_P2) else f"no two latents of {on.control.arm} {together}",
    }


def _shown(on: Bench, control: Control, after: PairsIn, followed: Followed) -> list[dict[str, Any]]:
    """The separated pairs whose interference fell most, with texts if there are any."""
    before, pairs = control.pairs, cast("list[list[int]]", control.pair_P2[followed.most].tolist())
    latents = list(dict.fromkeys(latent for pair in pairs for latent in pair))
    alone: dict[int, list[dict[str, Any]]] = {latent: [] for latent in latents}
    together: list[list[dict[str, Any]]] = [[] for _ in pairs]
    if Need.model in on.layer.has and pairs:
        text, rows = on.layer.once(HeldoutText), strongest_rows((f_BF[:, latents] for f_BF in on.latents), len(latents))
        alone = {latent: text.around(found, CONTEXTS, AROUND) for latent, found in zip(latents, rows, strict=True)}
        together = [text.around(control.together[place], CONTEXTS, AROUND) for place in followed.most]
    return [
        {
            "latents": pair,
            "cosine": [float(each.cosine_P[place]) for each in (before, after)],
            "co_activation": [float(each.co_activation_P[place]) for each in (before, after)],
            "joint": [int(each.joint_P[place]) for each in (before, after)],
            "same_direction": followed.same_P2[place].tolist(),
            "together": texts,
            "alone": [alone[latent] for latent in pair],
        }
        for place, pair, texts in zip(followed.most, pairs, together, strict=True)
    ]
