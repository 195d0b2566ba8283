"""Holds the table of metrics. Page, glossary, files and terminal take their columns from its entries."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pipeline.report.capture_metrics import CAPTURE
from pipeline.report.columns import Brief, Caveat, Column, Family, Group, Metric, Planned, Term
from pipeline.report.glossary import BENCH, FOUND, INTERFERENCE, PLANTED, PROBING, RECOVERED, SILENT, STABILITY
from pipeline.report.results import Results
from pipeline.report.suite_metrics import SUITE
from pipeline.report.text import count, one, percent, three

FVU = Metric(
    ("fvu",),
    "FVU",
    Term(
        "fvu",
        "FVU",
        "Fraction of variance unexplained: squared error of the reconstructions over the variance of the activations, on "
        "held-out tokens; no unit, 0 is perfect and 1 is no better than the mean, lower is more faithful.",
    ),
    three,
    Group.reconstruction,
    better="lower",
    planned=Planned("FVU", "fvu"),
    caveat=Caveat.equal_l0,
    pareto="FVU",
    brief=Brief("FVU"),
)
L0 = Metric(
    ("l0",),
    "L0",
    Term(
        "l0",
        "L0",
        "Mean number of latents that fire on a token; lower is sparser, and neither direction is better by itself.",
    ),
    one,
    Group.reconstruction,
    brief=Brief("L0", digits=1),
)
DEAD = Metric(
    ("dead_fraction",),
    "dead",
    Term("dead", "Dead", "Share of latents that fire on no held-out token; per cent, lower wastes less."),
    percent,
    Group.latents,
    better="lower",
)
SAME_DIRECTION = Metric(
    ("interference", "fixed", "same_direction"),
    "still same latent",
    Term(
        "same-direction",
        "Still same latent",
        "Mean cosine of each latent’s direction to that of the latent with the same index in the baseline of the same "
        "seed. Interference on the baseline’s pairs means something only while an index stands for the same latent; 1 is "
        "identical.",
    ),
    three,
    Group.geometry,
)


def probing(ks: Sequence[str], tasks: Sequence[str]) -> Iterator[Column]:  # noqa: ARG001 - a Family takes both
    """Sparse probing accuracy for each number of latents, then the model's own."""
    planned = {k: Planned(f"Sparse probing, k = {k}", "sparse_probing") for k in ("1", "5")}
    for k in ks:
        brief = Brief(f"top {k}") if k in (ks[0], ks[-2]) else None  # the smallest and the largest; the last is "all"
        yield Metric(
            ("sparse_probing", k),
            k,
            PROBING,
            three,
            Group.probing,
            better="higher",
            planned=planned.get(k),
            pareto=f"Sparse probing, k = {k}" if k == ("5" if "5" in ks else ks[0]) else None,
            brief=brief,
        )
    yield from (Column(("llm_probing", k)) for k in ks)


def probing_by_task(ks: Sequence[str], tasks: Sequence[str]) -> Iterator[Column]:
    """The same for each task."""
    for field in ("sparse_probing_by_task", "llm_probing_by_task"):
        yield from (Column((field, task, k)) for task in tasks for k in ks)


METRICS: list[Column | Family] = [
    *(Column((name,)) for name in ("arm", "seed", "layer", "sparsity", "backbone", "penalty", "sae", "steps")),
    Metric(
        ("tokens",),
        "tokens",
        Term("tokens", "Tokens", "Tokens an SAE was trained on; a count."),
        count,
        Group.effort,
        compared=False,
    ),
    Metric(
        ("seconds",),
        "seconds",
        Term("seconds", "Seconds", "Time an SAE’s training took; seconds on the machine at hand, lower is cheaper."),
        one,
        Group.effort,
        compared=False,
    ),
    Column(("degenerate",)),
    FVU,
    Metric(
        ("cosine",),
        "cosine",
        Term(
            "cosine",
            "Cosine",
            "Mean cosine between an activation and its reconstruction; no unit, 1 is perfect, higher is more faithful.",
        ),
        three,
        Group.fidelity,
        better="higher",
        caveat=Caveat.equal_l0,
    ),
    L0,
    DEAD,
    Metric(
        ("max_decoder_cosine",),
        "decoder cosine",
        Term(
            "decoder-cosine",
            "Decoder cosine",
            "Mean over latents of the largest cosine to any other latent’s decoder direction; no unit, from −1 to 1, lower "
            "means directions that are further apart.",
        ),
        three,
        Group.pairs,
        pareto="Cosine to the nearest latent",
    ),
    Metric(
        ("geometry", "near"),
        "nearly one",
        Term(
            "near",
            "Nearly one",
            "Share of latents whose direction has a cosine of at least 0.9 to another’s; from 0 to 1, lower means that "
            "fewer latents say the same twice.",
        ),
        three,
        Group.geometry,
        better="lower",
    ),
    Metric(
        ("geometry", "nearest_random"),
        "decoder cosine, random",
        Term(
            "nearest-random",
            "Decoder cosine, random",
            "Decoder cosine of as many random directions: what the dimension alone makes of it.",
        ),
        three,
        Group.geometry,
        compared=False,
    ),
    Metric(
        ("geometry", "encoder_decoder"),
        "encoder and decoder",
        Term(
            "encoder-decoder",
            "Encoder and decoder",
            "Mean cosine of a latent’s encoder direction to its decoder direction; no unit, 1 is a tied SAE, and neither "
            "direction is better by itself.",
        ),
        three,
        Group.geometry,
    ),
    *(Column(("geometry", name)) for name in ("nearest", "near_random", "directions")),
    # Each pair of seeds counts in two SAEs: these are no independent observations for a test.
    Metric(("stability", "mcc"), "found by other seeds", STABILITY, three, Group.geometry, better="higher", compared=False),
    Metric(
        ("stability", "mmcs"), "nearest of other seeds", STABILITY, three, Group.geometry, better="higher", compared=False
    ),
    *(Column(("stability", name)) for name in ("seeds", "reason")),
    Metric(
        ("resets",),
        "resets",
        Term(
            "resets",
            "Resets",
            "How many times a dead latent was re-initialised during training; a count, with no better direction.",
        ),
        count,
        Group.effort,
        compared=False,
    ),
    probing,
    *(Column(("loss", name)) for name in ("clean", "sae", "zero", "mean")),
    Metric(
        ("loss", "recovered_zero"),
        "loss",
        RECOVERED,
        three,
        Group.reconstruction,
        better="higher",
        caveat=Caveat.equal_l0,
        pareto="Loss recovered",
    ),
    Metric(
        ("loss", "recovered_mean"),
        "loss rec., mean",
        RECOVERED,
        three,
        Group.fidelity,
        better="higher",
        caveat=Caveat.equal_l0,
    ),
    Column(("loss", "reason")),
    Column(("interference", "own", "pairs")),
    Metric(
        ("interference", "own", "interference"),
        "interf., own",
        INTERFERENCE,
        three,
        Group.pairs,
        better="lower",
        planned=Planned("Interference, own pairs", "interference"),
        caveat=Caveat.near_l0,
        pareto="Interference on own pairs",
    ),
    Metric(("interference", "own", "co_activation"), "co-firing, own pairs", INTERFERENCE, three, Group.geometry),
    Column(("interference", "fixed", "pairs")),
    Metric(
        ("interference", "fixed", "interference"),
        "baseline’s pairs",
        INTERFERENCE,
        three,
        Group.pairs,
        # Not planned: the pairs are the baseline's, and even a baseline that read its batches in another order has less.
        better="lower",
    ),
    Column(("interference", "fixed", "co_activation")),
    Metric(
        ("interference", "both", "change"),
        "beside baseline",
        Term(
            "beside-baseline",
            "Interference beside the baseline’s",
            "Interference less that of the baseline of the same seed, both on the pairs that are similar in either of the "
            "two: on the pairs of one alone, the other has less by drift. No unit; below 0 is less than the baseline.",
        ),
        three,
        Group.geometry,
        better="lower",
    ),
    *(Column(("interference", "both", name)) for name in ("pairs", "interference", "baseline")),
    SAME_DIRECTION,
    *CAPTURE,
    *(
        Metric(
            ("synth_sae_bench", name),
            heading,
            BENCH,
            three,
            Group.bench,
            better="higher",
            planned=Planned(asked, "true_features"),
            pareto=asked,
            brief=Brief(brief),
        )
        for name, heading, asked, brief in (
            ("mcc", "MCC", "MCC with the true features", "MCC"),
            ("f1_score", "F1 of latents", "F1 of latents as detectors of true features", "F1"),
        )
    ),
    *(
        Metric(("synth_sae_bench", name), name, BENCH, three, Group.bench, better="higher")
        for name in ("precision", "recall", "uniqueness")
    ),
    # Of the next three the first two repeat FVU and dead, in the words of the published table.
    Metric(("synth_sae_bench", "explained_variance"), "EV", BENCH, three, Group.bench, compared=False),
    Metric(("synth_sae_bench", "dead_latents"), "dead latents", BENCH, count, Group.bench, compared=False),
    Metric(("synth_sae_bench", "shrinkage"), "shrinkage", BENCH, three, Group.bench),
    *(Column(("synth_sae_bench", name)) for name in ("sae_l0", "true_l0", "accuracy")),
    Metric(("ground_truth", "features", "all", "recovered"), "found", FOUND, three, Group.truth, better="higher"),
    Metric(
        ("ground_truth", "features", "all", "one_to_one"),
        "one to one",
        FOUND,
        three,
        Group.truth,
        better="higher",
        planned=Planned("True features found, one latent to each", "true_features"),
        brief=Brief("found"),
    ),
    Metric(
        ("ground_truth", "features", "all", "f1"),
        "F1",
        Term(
            "f1",
            "F1",
            "How well a found feature’s latent detects the feature, mean over the features found; from 0 to 1, higher is "
            "better, but an arm that finds fewer averages over fewer.",
        ),
        three,
        Group.truth,
        better="higher",
        brief=Brief("F1", digits=2),
    ),
    Metric(
        ("ground_truth", "absorption", "with_child"),
        "silent",
        SILENT,
        three,
        Group.truth,
        better="lower",
        planned=Planned("Parents silent beside their child (absorption)", "absorption"),
        brief=Brief("silent", digits=2),
    ),
    Metric(
        ("ground_truth", "features", "all", "max_cosine"),
        "cosine to truth",
        FOUND,
        three,
        Group.planted,
        better="higher",
        compared=False,
    ),
    Metric(
        ("ground_truth", "absorption", "alone"),
        "silent alone",
        SILENT,
        three,
        Group.planted,
        better="lower",
        compared=False,
        brief=Brief("alone", digits=2, spread=False),
    ),
    Metric(("ground_truth", "pairs", "all", "matched"), "planted pairs", PLANTED, count, Group.planted, compared=False),
    Metric(
        ("ground_truth", "pairs", "all", "captured"),
        "of them captured",
        PLANTED,
        three,
        Group.planted,
        compared=False,
        brief=Brief("captured", digits=2, spread=False, of=("ground_truth", "pairs", "all", "matched")),
    ),
    Metric(("ground_truth", "pairs", "chance"), "by chance", PLANTED, three, Group.planted, compared=False),
    Metric(("ground_truth", "false_capture", "rate"), "false capture", PLANTED, three, Group.planted, compared=False),
    *SUITE,
    probing_by_task,
]
"""In the order of results.csv. An entry that a script appends becomes its last column."""


def columns(results: Results) -> list[Column]:
    """The columns of a study's results.csv, also those that none of its SAEs has a value for."""
    ks, tasks = results.probe_sizes, [task.name for task in results.tasks]
    found = [column for entry in METRICS for column in ([entry] if isinstance(entry, Column) else entry(ks, tasks))]
    return [column for column in found if results.is_synthetic or column.path[0] not in ("ground_truth", "synth_sae_bench")]


def measured(results: Results) -> list[Metric]:
    """The metrics that some SAE of a study has, by group."""
    found = [metric for metric in columns(results) if isinstance(metric, Metric)]
    found = [metric for metric in found if any(metric.of(row) is not None for row in results.rows)]
    return sorted(found, key=lambda metric: [*Group].index(metric.group))


def compared(results: Results) -> list[Metric]:
    """The measured metrics whose differences between arms are taken: not of L0 where it is made equal.

    Planned ones know which difference matters to the study.
    """
    found = (metric for metric in measured(results) if metric.compared and not (metric is L0 and results.levels))
    return [
        replace(metric, planned=metric.planned.of_study(results.worth)) if metric.planned else metric for metric in found
    ]
