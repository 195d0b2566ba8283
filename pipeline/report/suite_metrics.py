"""The metrics of sae-bench's other evaluations, an excerpt of the table in `metrics`."""

from typing import Literal

from pipeline.report.columns import Caveat, Column, Group, Metric, Term
from pipeline.report.text import three

SPLICED = Term(
    "spliced",
    "Core",
    "sae-bench’s own loss and KL divergence with the SAE spliced into every token: (ablated − with SAE) / (ablated − "
    "clean), ablated to zero; 1 is as good as no SAE. The main table’s loss leaves out BOS and also ablates to the mean.",
)
SPURIOUS = Term(
    "scr",
    "SCR",
    "Spurious correlation removal: how much of the accuracy that a spurious concept cost a probe comes back when the 20 "
    "latents that matter most to the concept are ablated; 1 is all of it, below 0 is worse than before.",
)
TARGETED = Term(
    "tpp",
    "TPP",
    "Targeted probe perturbation: how much more accuracy the probe of a class loses than those of other classes when the 20 "
    "latents that matter most to the class are ablated; higher means that fewer latents serve several classes.",
)
ABSORBED = Term(
    "absorption",
    "Absorption",
    "Share of words with a first letter of which the letter’s latents are silent, or weak, and others stand in for them; "
    "from 0 to 1, lower is better. Only of a model that can spell.",
)
COMPOSED = Term(
    "composition",
    "Composition",
    "Share of the decoder’s variance that an SAE of a quarter of the width explains with 4 latents (meta-SAE); lower means "
    "that directions are not made of common parts.",
)
MANY = Term(
    "sae-probes",
    "SAE probes",
    "Test accuracy of a probe on the k most telling latents at the last token, mean over the data sets of sae-probes.",
)
DISENTANGLED = Term(
    "ravel",
    "RAVEL",
    "How well latents change one attribute of an entity and leave the others; from 0 to 1, higher is better.",
)
UNLEARNT = Term(
    "unlearning", "Unlearning", "How much dangerous knowledge clamping latents takes out at little cost; higher is better."
)
EXPLAINED = Term(
    "autointerp",
    "Autointerp",
    "How often a language model tells from an explanation of a latent on which texts it fires; from 0 to 1.",
)


def _metric(
    path: tuple[str, str],
    heading: str,
    term: Term,
    better: Literal["higher", "lower"] = "higher",
    *,
    pareto: str | None = None,
    caveat: Caveat | None = None,
) -> Metric:
    return Metric(path, heading, term, three, Group.suite, better=better, pareto=pareto, caveat=caveat)


SUITE: list[Column] = [
    _metric(("core", "ce_loss_score"), "loss", SPLICED, caveat=Caveat.equal_l0),
    _metric(("core", "kl_div_score"), "KL", SPLICED, caveat=Caveat.equal_l0),
    _metric(("scr", "scr_metric_threshold_20"), "SCR", SPURIOUS, pareto="SCR, 20 latents"),
    _metric(("tpp", "tpp_threshold_20_total_metric"), "TPP", TARGETED, pareto="TPP, 20 latents"),
    _metric(("absorption", "mean_absorption_fraction_score"), "absorption", ABSORBED, "lower", pareto="Absorption"),
    _metric(("absorption", "mean_full_absorption_score"), "full absorption", ABSORBED, "lower"),
    _metric(
        ("meta_structure", "decoder_fraction_variance_explained"), "composition", COMPOSED, "lower", pareto="Composition"
    ),
    _metric(("sparse_probing_sae_probes", "sae_top_1_test_accuracy"), "probes, k = 1", MANY),
    _metric(("sparse_probing_sae_probes", "sae_top_5_test_accuracy"), "probes, k = 5", MANY),
    _metric(("ravel", "disentanglement_score"), "RAVEL", DISENTANGLED),
    _metric(("unlearning", "unlearning_score"), "unlearning", UNLEARNT),
    _metric(("autointerp", "autointerp_score"), "autointerp", EXPLAINED),
    Column(("absorption", "reason")),
]
"""In the order of the page. The files of the evaluations have more: other numbers of latents, letters, data sets."""
