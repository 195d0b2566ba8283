"""What a study found, in sentences that a README can quote."""

from small_results import results_of, row

from pipeline.report.findings import findings


def test_every_planned_comparison_is_named_with_its_size_interval_and_verdict() -> None:
    fvu = {"full": [0.100, 0.101, 0.102], "worse": [0.200, 0.201, 0.203], "same": [0.100, 0.1012, 0.1021]}
    rows = [
        row(arm, seed, layer, fvu=values[seed], l0=20.0)
        for layer in (2, 3)
        for arm, values in fvu.items()
        for seed in range(3)
    ]
    page = findings(results_of(rows))
    first, blank, heading, *_ = page.splitlines()
    assert first.startswith(
        "some: Of the 4 planned comparisons, 2 can be told from seed noise, and 2 are equal within what matters"
    )
    assert (blank, heading) == ("", "Layer 2:")
    assert page.count("- `worse` minus `full`: FVU +0.100 (+0.09") == 2
    assert page.count("worse by more than 0.01.\n") == 2
    assert page.count("equal within 0.01.\n") == 2
    assert "Layer 3:" in page


def test_what_is_undecided_or_unknown_is_said() -> None:
    rows = [
        row(arm, seed, fvu=value, l0=20.0)
        for arm, values in {"full": [0.1, 0.2, 0.3], "a": [0.3, 0.1, 0.2]}.items()
        for seed, value in enumerate(values)
    ]
    assert ", undecided.\n" in findings(results_of(rows))
    alone = findings(results_of([row("full", 0, fvu=0.1, l0=20.0), row("a", 0, fvu=0.2, l0=20.0)]))
    assert "FVU +0.100, one seed: nothing can be told." in alone
    assert "No comparison was planned" in findings(results_of([row("full", 0, fvu=0.1, l0=20.0)]))


def test_what_a_study_cannot_measure_is_neither_counted_nor_listed() -> None:
    """A metric of one arm alone has no comparison."""
    rows = [row(arm, seed, fvu=0.1 + 0.01 * seed, l0=20.0) for arm in ("full", "a") for seed in range(3)]
    lone = [one.model_copy(update={"sparse_probing": {"1": 0.7}}) if one.arm == "a" else one for one in rows]
    assert any(entry.planned and not entry.seeds for entry in results_of(lone).differences)
    page = findings(results_of(lone))
    assert page.startswith("some: None of the one planned comparison") or "Of the one planned comparison" in page
    assert "Sparse probing" not in page
