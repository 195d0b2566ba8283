"""Shows a flow run's progress, table of results, comparison and link to the report on Prefect's pages.

A failure here never ends a run: training takes hours, and a server may be away for a minute.
"""

import base64
import os
import re
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from logging import Logger, LoggerAdapter
from typing import TYPE_CHECKING, Any

from prefect import get_run_logger
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from pipeline.artefacts.storage import Storage
from pipeline.front import REPORTS_VARIABLE
from pipeline.runtime.progress import Advance
from pipeline.study.reports import PAGE

if TYPE_CHECKING:
    from pipeline.report.results import Results

SECONDS_BETWEEN_UPDATES = 5.0
SECONDS_BETWEEN_LINES = 60.0


def slug(*parts: str) -> str:
    """A key that Prefect accepts: lower-case letters, digits and dashes."""
    return re.sub("[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


class ProgressPage:
    """A watcher for `pipeline.runtime.progress`: a progress artifact, and a line in the run's log once a minute.

    A thread talks to the server, so that the work never waits for it.
    """

    def __init__(self, experiment: str, part: str = ""):
        self.experiment, self.part = experiment, part
        self.log = get_run_logger()

    @contextmanager
    def __call__(self, title: str, total: int, unit: str) -> Generator[Advance]:
        """Show one piece of work from start to end."""
        started = logged = time.monotonic()
        done, last = 0, ""
        ended = threading.Event()
        key = slug(self.experiment, title.split(",", maxsplit=1)[0], self.part)
        self.log.info("%s: %s %s to do", title, f"{total:,}", unit)

        def show() -> None:
            page = quietly(self.log, lambda: create_progress_artifact(0.0, key=key, description=f"{title}: starting"))
            while page:
                at_its_end = ended.wait(SECONDS_BETWEEN_UPDATES)
                now = time.monotonic() - started
                text = f"{title}: {done:,} of {total:,} {unit}, {now:.0f} s{', ' + last if last else ''}"
                percent = min(100.0, 100.0 * done / max(1, total))
                quietly(self.log, partial(update_progress_artifact, page, progress=percent, description=text))
                if at_its_end:
                    return

        def advance(amount: int = 1, remark: str = "") -> None:
            nonlocal done, last, logged
            done, last = done + amount, remark or last
            now = time.monotonic()
            if done and now - logged >= SECONDS_BETWEEN_LINES:
                logged = now
                left = (now - started) / done * (total - done)
                self.log.info("%s: %s of %s %s, %.0f s left %s", title, f"{done:,}", f"{total:,}", unit, left, last)

        shown = threading.Thread(target=copy_context().run, args=(show,), daemon=True)
        shown.start()
        try:
            yield advance
        finally:
            ended.set()
        shown.join()
        self.log.info("%s: %s %s in %.0f s %s", title, f"{done:,}", unit, time.monotonic() - started, last)


def quietly(log: "Logger | LoggerAdapter[Any]", action: Callable[[], Any]) -> Any:
    """Call `action` and return its result; log an error and return None instead of raising it."""
    try:
        return action()
    except Exception as error:
        log.warning("not shown on Prefect's pages: %s", " ".join(str(error).split()))
        return None


def show_results(results: "Results") -> None:
    """Show the table of the SAEs, and the planned comparisons as an image."""
    log = get_run_logger()
    experiment, description = results.experiment, results.description
    table = _table(results)
    quietly(log, lambda: create_table_artifact(table, key=slug(experiment, "results"), description=description))
    for layer, image in _comparisons(results).items():
        # Not an image artifact, whose page would print the whole of such a URL below the picture.
        picture = f"![planned differences](data:image/svg+xml;base64,{base64.b64encode(image.encode()).decode()})"
        key = slug(experiment, f"comparison layer {layer}")
        caption = f"{experiment}, layer {layer}: planned differences with 95 % intervals, filled where one can be told"
        quietly(log, partial(create_markdown_artifact, picture, key=key, description=caption))


def show_report(experiment: str, place: Storage) -> None:
    """Link the report: at the address that DASAE_REPORTS names, where `dasae serve` shows it, or else where it is.

    A report on an object store gets a presigned URL, which works for some days.
    """

    def show() -> None:
        served = os.environ.get(REPORTS_VARIABLE)
        link = f"{served.rstrip('/')}/{experiment}/" if served else place.link(PAGE)
        description = f"The report of {experiment}, one self-contained page: `{place}/{PAGE}`"
        create_link_artifact(link, link_text="open the report", key=slug(experiment, "report"), description=description)

    quietly(get_run_logger(), show)


def _table(results: "Results") -> list[dict[str, Any]]:
    """One row per SAE: FVU, L0, dead latents, probing scores and pair capture."""
    from pipeline.report.capture_metrics import UNION
    from pipeline.report.columns import Column
    from pipeline.report.metrics import DEAD, FVU, L0

    shown: dict[str, Column] = {metric.heading: metric for metric in (FVU, L0, DEAD)}
    shown |= {f"probing k={k}": Column(("sparse_probing", str(k))) for k in results.k_values}
    shown["pair capture"] = UNION

    def rounded(value: Any) -> Any:
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return [
        {"arm": row.arm, "seed": row.seed, "layer": row.layer}
        | {heading: rounded(column.of(row)) for heading, column in shown.items()}
        | {"degenerate": row.degenerate}
        for row in results.rows
    ]


def _comparisons(results: "Results") -> dict[int, str]:
    """An SVG image of the planned differences of every layer that has some."""
    from pipeline.report.page import comparison_image

    images = {layer: comparison_image(results, layer) for layer in results.layers}
    return {layer: image for layer, image in images.items() if image}
