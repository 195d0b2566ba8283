"""Results of made-up studies, and real ones with some values changed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.report.differences import differences
from pipeline.report.results import Arm, Cost, MadeOf, Model, Results, Row, StoreFacts, Task, Training


def row(arm: str, seed: int = 0, layer: int = 2, **fields: Any) -> Row:
    """An SAE of which only `fields` are known."""
    known: dict[str, Any] = {"arm": arm, "seed": seed, "layer": layer, "sae": "0123456789ab", "degenerate": None}
    return Row.model_validate(known | fields)


def results_of(
    rows: Iterable[Row],
    *,
    experiment: str = "some",
    bases: Mapping[str, str | None] | None = None,
    tasks: Sequence[str] = (),
    store: str = "aaa",
    training: Mapping[str, Any] | None = None,
) -> Results:
    """A study of these rows with probes of one latent; arms change `full` where `bases` does not say otherwise."""
    rows, bases = tuple(rows), bases or {}
    arms = {one.arm: bases.get(one.arm, None if one.arm == "full" else "full") for one in rows}
    return compared(
        Results(
            experiment=experiment,
            description="A study.",
            generated="2026-11-23T08:00:00+00:00",
            version="0.1.0",
            made_of=MadeOf(version="0.1.0", description="A study.", arms={}, evaluations={}),
            is_demo=False,
            is_synthetic=False,
            model=Model(name="some-model", facts={"depth": 4}),
            reported_llm_probing=None,
            store=StoreFacts(
                key=store, rows=1000, bytes=5, layers=(2,), context=32, d_in=8, seconds=1.0, corpus="<b>text</b>"
            ),
            tasks=tuple(Task(name=name, classes=("a", "b"), train_size=6, test_size=3) for name in tasks),
            training=Training.model_validate({"d_sae": 16, "steps": 500, "heldout_rows": 100} | dict(training or {})),
            arms=tuple(Arm(arm=arm, run=None, question="What if?", base=base) for arm, base in arms.items()),
            k_values=(1,),
            rows=rows,
            curves=(),
            missing=(),
            examples=(),
            cost=Cost(model_seconds=0, extract_seconds=0, train_seconds=0, evaluate_seconds=0, store_bytes=5),
        )
    )


def compared(results: Results, **changes: Any) -> Results:
    """Results with some fields changed, and the differences that follow."""
    changed = results.model_copy(update=changes)
    return changed.model_copy(update={"differences": tuple(differences(changed))})


def altered(row: Row, values: Mapping[tuple[str, ...], Any]) -> Row:
    """A row with other values at some paths."""
    data = row.model_dump()
    for (*sections, name), value in values.items():
        section = data
        for key in sections:
            section = section[key]
        section[name] = value
    return Row.model_validate(data)
