"""Measures which of a synthetic model's features an SAE recovered (docs/method.md, "Synthetic features").

A feature's best latent is the one whose decoder direction has the largest cosine to it. The feature is recovered when that
cosine exceeds MATCH and the latent is live.
"""

from typing import Any, cast

import torch
from scipy.optimize import linear_sum_assignment  # pyright: ignore[reportUnknownVariableType]

from pipeline.evaluate.bench import Bench, LayerBench
from pipeline.evaluate.pairs import topk_mask
from pipeline.evaluate.sparse import SparseLatents
from pipeline.models.synthetic import NO_PARENT, Truth
from pipeline.runtime.devices import CPU
from pipeline.sae.sae import SAE
from pipeline.study.sections import EvaluateConfig

MATCH = 0.8
"""Cosine above which a latent's direction counts as that of a feature."""


class Recovery:
    """Counts where latents and true features fire. Call `update` with rows, then `compute`.

    On the CPU, where the true features are drawn: a synthetic model has a few hundred latents.
    """

    def __init__(self, sae: SAE, truth: Truth):
        sae = sae.to(CPU)
        self.truth = truth
        self.W_dec_FD = sae.W_dec_FD
        self.cosine_TF = truth.direction_TD @ sae.W_dec_FD.T
        self.best_T = self.cosine_TF.argmax(dim=1)
        self.child_C = (truth.parent_T != NO_PARENT).nonzero().squeeze(1)
        self.parent_C = truth.parent_T[self.child_C]
        features, children = len(self.best_T), len(self.child_C)
        self.rows = 0
        self.fired_F = torch.zeros(sae.d_sae, dtype=torch.int64)
        self.strength_FF = torch.zeros(sae.d_sae, sae.d_sae, dtype=torch.float64)
        self.present_T = torch.zeros(features, dtype=torch.int64)
        self.detected_T = torch.zeros(features, dtype=torch.int64)
        self.with_child_C = torch.zeros(children, dtype=torch.int64)
        self.silent_with_child_C = torch.zeros(children, dtype=torch.int64)
        self.alone_C = torch.zeros(children, dtype=torch.int64)
        self.silent_alone_C = torch.zeros(children, dtype=torch.int64)

    def update(self, f_BF: torch.Tensor, true_BT: torch.Tensor) -> None:
        """Take in the latents [B, F] of some rows and the true features [B, T] behind them."""
        present_BT, fires_BT = true_BT > 0, f_BF[:, self.best_T] > 0
        self.rows += len(f_BF)
        self.fired_F += (f_BF > 0).sum(dim=0)
        self.strength_FF += f_BF.T @ f_BF
        self.present_T += present_BT.sum(dim=0)
        self.detected_T += (present_BT & fires_BT).sum(dim=0)

        children_BT = torch.zeros_like(true_BT).index_add_(1, self.parent_C, present_BT[:, self.child_C].to(true_BT.dtype))
        with_child_BC = (present_BT & fires_BT)[:, self.child_C]
        alone_BC = (present_BT & (children_BT == 0))[:, self.parent_C]
        silent_BC = ~fires_BT[:, self.parent_C]
        self.with_child_C += with_child_BC.sum(dim=0)
        self.silent_with_child_C += (with_child_BC & silent_BC).sum(dim=0)
        self.alone_C += alone_BC.sum(dim=0)
        self.silent_alone_C += (alone_BC & silent_BC).sum(dim=0)

    def compute(self, config: EvaluateConfig) -> dict[str, Any]:
        """The metrics, over all rows seen. An undefined value is None, and `reason` says why.

        features: by group. recovered: share whose best latent is live and has a cosine above MATCH; `matched` is their
        number. one_to_one: share recovered when no latent may stand for two features. max_cosine: mean cosine to the best
        latent. f1: of the best latent's firing as a detector of the feature, mean over the recovered ones.

        absorption: means over the parent-child pairs, `matched` of `planted`, that are recovered by two distinct latents.
        with_child: of the rows on which the child and its latent fire, the share on which the parent's latent is silent.
        alone: the same of the rows on which the parent fires without any child.

        pairs: by kind. captured: share of the pairs, `matched` as above, whose latents are in the union mask P of the pair
        capture rate. chance: share of all pairs of live latents in P.
        false_capture: of the pairs in P that the penalty pushes most, by cosine times mean product of strengths, the share
        that are not planted; as many pairs as planted ones are matched.
        """
        live_F = self.fired_F >= config.live_firings
        matched_T = (self.cosine_TF.max(dim=1).values > MATCH) & live_F[self.best_T]
        hierarchy_C2 = torch.stack([self.parent_C, self.child_C], dim=1)
        planted = {"correlated": self.truth.pair_P2, "parent_child": hierarchy_C2}
        planted["all"] = torch.cat(list(planted.values()))
        matched = {kind: pair_P2[self._distinct(pair_P2, matched_T)] for kind, pair_P2 in planted.items()}
        mask_FF = self._mask(live_F, config.capture_topk)
        live_pairs = int(live_F.sum()) * (int(live_F.sum()) - 1) / 2
        return {
            "rows": self.rows,
            "features": self._features(matched_T, live_F),
            "absorption": self._absorption(self._distinct(hierarchy_C2, matched_T)),
            "pairs": {kind: self._captured(len(pair_P2), matched[kind], mask_FF) for kind, pair_P2 in planted.items()}
            | {"chance": float(mask_FF.sum() / live_pairs) if live_pairs else None},
            "false_capture": self._false_capture(matched["all"], mask_FF),
        }

    def _distinct(self, pair_P2: torch.Tensor, matched_T: torch.Tensor) -> torch.Tensor:
        """bool [P]: both features are recovered, by two latents."""
        best_P2 = self.best_T[pair_P2]
        return matched_T[pair_P2].all(dim=1) & (best_P2[:, 0] != best_P2[:, 1])

    def _mask(self, live_F: torch.Tensor, topk: float) -> torch.Tensor:
        """bool [F, F]: P, each unordered pair once, above the diagonal."""
        live_N = live_F.nonzero().squeeze(1)
        mask_FF = torch.zeros(len(live_F), len(live_F), dtype=torch.bool)
        top_NN = topk_mask(self.W_dec_FD[live_N], topk)
        mask_FF[live_N[:, None], live_N] = top_NN | top_NN.T
        return mask_FF.triu(diagonal=1)

    def _features(self, matched_T: torch.Tensor, live_F: torch.Tensor) -> dict[str, Any]:
        allowed_TF = (self.cosine_TF > MATCH) & live_F
        assign = cast("Any", linear_sum_assignment)  # scipy has no types
        feature, latent = assign((self.cosine_TF * allowed_TF).numpy(), maximize=True)
        one_to_one_T = torch.zeros_like(matched_T)
        one_to_one_T[feature] = allowed_TF[feature, latent]
        max_cosine_T = self.cosine_TF.max(dim=1).values.double()
        f1_T = 2 * self.detected_T / (self.present_T + self.fired_F[self.best_T]).clamp_min(1)

        def of_group(group_T: torch.Tensor) -> dict[str, Any]:
            features, matched = int(group_T.sum()), int((matched_T & group_T).sum())
            reason = None if matched else f"no latent matches any of {features} features"
            return {
                "features": features,
                "matched": matched,
                "recovered": matched / features if features else None,
                "one_to_one": float(one_to_one_T[group_T].double().mean()) if features else None,
                "max_cosine": float(max_cosine_T[group_T].mean()) if features else None,
                "f1": float(f1_T[matched_T & group_T].double().mean()) if matched else None,
                "reason": reason,
            }

        return {name: of_group(group_T) for name, group_T in self._groups().items()}

    def _groups(self) -> dict[str, torch.Tensor]:
        """bool [T] each: all features, and the parts they fall into."""
        parts = {"parents": self.parent_C, "children": self.child_C, "correlated": self.truth.pair_P2.flatten()}
        everything_T = torch.ones(len(self.best_T), dtype=torch.bool)
        groups = {name: torch.zeros_like(everything_T).index_fill_(0, members, True) for name, members in parts.items()}
        free_T = everything_T & ~torch.stack(list(groups.values())).any(dim=0)
        return {"all": everything_T, "free": free_T, **groups}

    def _absorption(self, distinct_C: torch.Tensor) -> dict[str, Any]:
        measured_C = distinct_C & (self.with_child_C > 0) & (self.alone_C > 0)
        rates: dict[str, Any] = {"planted": len(distinct_C), "matched": int(measured_C.sum())}
        if not measured_C.any():
            reason = f"of {len(distinct_C)} parent-child pairs none has two latents of its own that fire with their features"
            return rates | {"with_child": None, "alone": None, "reason": reason}
        return rates | {
            "with_child": float((self.silent_with_child_C / self.with_child_C)[measured_C].double().mean()),
            "alone": float((self.silent_alone_C / self.alone_C)[measured_C].double().mean()),
            "reason": None,
        }

    def _captured(self, planted: int, matched_P2: torch.Tensor, mask_FF: torch.Tensor) -> dict[str, Any]:
        rates: dict[str, Any] = {"planted": planted, "matched": len(matched_P2)}
        if not len(matched_P2):
            return rates | {"captured": None, "reason": f"of {planted} planted pairs none has two latents of its own"}
        low_P, high_P = self.best_T[matched_P2].sort(dim=1).values.T
        return rates | {"captured": float(mask_FF[low_P, high_P].double().mean()), "reason": None}

    def _false_capture(self, matched_P2: torch.Tensor, mask_FF: torch.Tensor) -> dict[str, Any]:
        low_P, high_P = self.best_T[matched_P2].sort(dim=1).values.T
        planted_FF = torch.zeros_like(mask_FF)
        planted_FF[low_P, high_P] = True
        row, column = mask_FF.nonzero(as_tuple=True)
        push = ((self.W_dec_FD @ self.W_dec_FD.T) * self.strength_FF)[row, column]
        strongest = push.sort(descending=True, stable=True).indices[: int(planted_FF.sum())]
        if not len(strongest):
            return {"pairs": 0, "rate": None, "reason": "no planted pair has two latents of its own"}
        false = ~planted_FF[row[strongest], column[strongest]]
        return {"pairs": len(strongest), "rate": float(false.double().mean()), "reason": None}


def compute(on: Bench) -> dict[str, Any]:
    """The content of `ground_truth.json` (docs/evaluation-files.md)."""
    recovery = Recovery(on.sae, on.layer.truth)
    for f_BF, true in zip(on.latents, on.layer.once(true_features), strict=True):
        recovery.update(f_BF.cpu(), true.dense())
    return recovery.compute(on.config)


def true_features(layer: LayerBench) -> list[SparseLatents]:
    """The features behind the held-out rows, chunk by chunk, drawn again."""
    layout = layer.store.layout
    return [SparseLatents.of(f_BT) for shard in layer.heldout_shards for f_BT, _ in layer.truth.draw(layout, shard)]
