"""The metrics of pair capture, an excerpt of the table in `metrics`."""

from collections.abc import Callable

from pipeline.report.columns import Brief, Column, Group, Metric, Term
from pipeline.report.glossary import MASKS
from pipeline.report.text import count, four, three, two

UNION = Metric(
    ("bpcr", "union"),
    "BPCR",
    Term(
        "bpcr",
        "BPCR, union",
        "Bidirectional pair capture rate: share of the most strongly co-firing pairs of latents that are among the most "
        "similar by direction as seen from either latent; from 0 to 1, not a score, falls when the penalty works.",
    ),
    three,
    Group.capture,
    brief=Brief("BPCR", digits=2, spread=False),
)
CHANCE = Metric(
    ("bpcr", "chance"),
    "chance",
    Term(
        "chance",
        "Chance",
        "The rate that a mask of the same size over random pairs would reach; from 0 to 1, the first null of BPCR.",
    ),
    three,
    Group.rates,
    compared=False,
    brief=Brief("chance", digits=2, spread=False),
)
RANDOM = Metric(
    ("bpcr", "random_tied"),
    "random",
    Term(
        "random",
        "Random",
        "The rate of an untrained SAE with random directions, encoder and decoder tied, at the same L0; from 0 to 1, the "
        "second null of BPCR, because similar directions fire together by geometry alone; mean over several draws.",
    ),
    three,
    Group.rates,
    compared=False,
    brief=Brief("random", digits=2, spread=False),
)


def _rate(name: str, heading: str, term: Term, show: Callable[[float], str] = three) -> Metric:
    """A number of the table of all SAEs; no differences are taken, because it is no score."""
    return Metric(("bpcr", name), heading, term, show, Group.rates, compared=False)


CAPTURE: list[Column] = [
    _rate("row", "row", MASKS),
    _rate("column", "column", MASKS),
    UNION,
    _rate("mutual", "mutual", MASKS),
    CHANCE,
    RANDOM,
    _rate("lift", "lift", Term("lift", "Lift", "BPCR union over chance; a ratio, 1 is chance, not a score."), two),
    _rate(
        "kappa",
        "kappa",
        Term("kappa", "Kappa", "(BPCR union − chance) / (1 − chance); 0 is chance and 1 is perfect, not a score."),
    ),
    _rate(
        "strength_weighted",
        "by strength",
        Term(
            "weighted",
            "By strength",
            "The share of the co-firing pairs’ summed strength that the union captures; from 0 to 1, not a score.",
        ),
    ),
    _rate(
        "permuted",
        "permuted",
        Term(
            "permuted",
            "Permuted",
            "The rate after the latents were relabelled at random, mean over draws; from 0 to 1, chance by simulation "
            "instead of by counting.",
        ),
        four,
    ),
    Column(("bpcr", "permuted_std")),
    _rate(
        "phi_union",
        "phi union",
        Term(
            "phi",
            "Phi, union",
            "BPCR where the pairs are those of the largest phi coefficients, which correct for how often each latent "
            "fires; from 0 to 1, not a score.",
        ),
    ),
    _rate(
        "random_tied_std",
        "random, sd",
        Term(
            "random-sd",
            "Random, sd",
            "Standard deviation of Random between draws of random directions; a difference to Random below it says nothing.",
        ),
    ),
    *(Column(("bpcr", name)) for name in ("phi_chance", "phi_lift", "phi_random_tied")),
    _rate(
        "live",
        "live",
        Term("live", "Live", "Latents that fire on enough held-out tokens to take part in BPCR; a count."),
        count,
    ),
    _rate("pairs", "pairs", Term("pairs", "Pairs", "Co-firing pairs over which BPCR is taken; a count."), count),
    Column(("bpcr", "reason")),
]
"""In the order of results.csv."""
