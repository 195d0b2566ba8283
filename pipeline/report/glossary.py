"""Holds the terms of the glossary that belong to no single metric. The others are in the entries of `metrics.METRICS`."""

from pipeline.report.columns import Term

MATRYOSHKA = (
    "Matryoshka SAEs (Bussmann et al., arXiv 2503.17547) make the first latents reconstruct by themselves; their authors "
    "claim less absorption and splitting at some cost in reconstruction."
)
"""What is claimed of prefixes, which are no penalty (`pipeline.study.penalties.PENALTIES` has the claims of those)."""

RECOVERED = Term(
    "recovered",
    "Loss recovered",
    "(loss ablated − loss with SAE) / (loss ablated − clean loss); 1 means no increase. The activations of this layer are "
    "ablated to zero, or to their mean; the losses are the language model’s.",
)
PROBING = Term(
    "probing",
    "Sparse probing accuracy",
    "Share of held-out texts that a logistic regression on the k most telling latents (or on all) classifies correctly, "
    "mean over tasks and over draws of the texts that a class is told from, which are the same for every SAE; from 0 to 1, "
    "chance is 0.5, higher means that few latents carry more information.",
)
INTERFERENCE = Term(
    "interference",
    "Interference",
    "The share of a reconstruction that is cross terms of latents with similar directions. It is taken on the pairs that "
    "the penalty would select in the baseline of the same seed, which are the same for all arms, or on each SAE’s own. No "
    "unit; lower means that similar latents overlap less. Co-firing is the same without the cosines.",
)
MASKS = Term(
    "masks",
    "BPCR, row, column, mutual",
    "BPCR where a pair of latents counts only if it is among the most similar as seen from its first latent, from its "
    "second, or from both; from 0 to 1, not a score.",
)
FOUND = Term(
    "found",
    "Found, one to one",
    "Share of the planted features to which a live latent’s direction has a cosine above 0.8; one to one: no latent may "
    "stand for two features. From 0 to 1, higher is better. Cosine to truth is the mean cosine of a feature to its best "
    "latent.",
)
BENCH = Term(
    "synth-sae-bench",
    "MCC, uniqueness, F1",
    "SAELens’ metrics of latents against true features, all latents counted, dead ones too. MCC: mean absolute cosine when "
    "each latent has a feature of its own (the best assignment). Uniqueness: true features that are nearest to some latent, "
    "over the number of latents. Precision, recall and F1: of each latent’s firing as a detector of the feature nearest to "
    "it. From 0 to 1, higher is better. Shrinkage: mean norm of a reconstruction over that of its row; 1 is none.",
)
SILENT = Term(
    "silent",
    "Silent",
    "Absorption: of the rows on which a child’s latent fires, the share on which its parent’s is silent; lower is better. "
    "Silent alone is the same share of the rows on which the parent fires without a child; it says what the "
    "latent misses anyway.",
)
PLANTED = Term(
    "planted",
    "Planted pairs, false capture",
    "The number of planted pairs of which both features have a latent of their own; the share of them that the mask "
    "captures, beside chance. False capture: of the pairs that the penalty pushes hardest, the share that was not planted. "
    "Not scores.",
)

STABILITY = Term(
    "stability",
    "Found by other seeds",
    "Mean cosine between the directions of two seeds of an arm, each matched to one of the other seed (MCC); nearest of "
    "other seeds: each to the nearest, which may be that of several. From −1 to 1, higher means that less depends on the "
    "seed.",
)

GENERAL = (
    Term(
        "arm",
        "Arm",
        "One training recipe: the arm “full” is the whole method, each other arm differs from it as its question says.",
    ),
    Term("seed", "Seed", "Seed of an SAE’s initial weights; two seeds of one arm differ in nothing else."),
    Term("latent", "Latent", "One of an SAE’s directions, together with how strongly it fires on a token."),
    Term(
        "degenerate",
        "Degenerate",
        "An SAE that failed to train: measuring it would give numbers without meaning, so the reason is given instead.",
    ),
    Term(
        "model-itself",
        "The model itself",
        "The same probe on the k most telling dimensions of the model’s own activations, without an SAE; from 0 to 1, a "
        "reference line and not an arm.",
    ),
    Term(
        "difference",
        "Difference",
        "An arm minus the arm it is compared with, mean over the seeds that both have; two arms of one seed share their "
        "initial weights and every batch.",
    ),
    Term(
        "interval",
        "95 % interval",
        "Where the mean difference over all possible seeds may lie: by Student’s t over the seeds, which is exact if "
        "differences are normal. It generalises to new seeds, not to other "
        "texts, tasks or models.",
    ),
    Term(
        "p",
        "p",
        "How often chance alone would give a difference at least this large, corrected by Holm’s method for all "
        "planned comparisons of the page; from 0 to 1.",
    ),
)
"""Terms of the whole page."""
