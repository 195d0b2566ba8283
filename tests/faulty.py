"""What the tests of faults share: a small study with many shards, processes that extract it, and what lies in a folder."""

import multiprocessing
import os
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from small_study import SMALL, Study

from pipeline.artefacts.manifest import MANIFEST
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import PipelineError
from pipeline.store import format as fmt
from pipeline.study.experiment import Experiment
from pipeline.study.plan import Plan, make_plan


@dataclass(frozen=True)
class Extraction:
    """A study to be extracted: its experiment file, its plan, and a workspace."""

    toml: Path
    plan: Plan
    workspace: Workspace

    @property
    def store(self) -> Path:
        """Folder of the activation store."""
        return self.workspace.folder(self.plan.store)

    def copy(self, folder: Path) -> "Extraction":
        """The same in another workspace."""
        shutil.copytree(self.workspace.local, folder)
        return Extraction(self.toml, self.plan, Workspace(folder))

    def unfilled(self) -> "Extraction":
        """Without any shard of the activation store, but with its tokens."""
        (self.store / MANIFEST).unlink()
        for name in fmt.shard_files(fmt.read_layout(self.workspace.storage(self.plan.store)), 0):
            shutil.rmtree(self.store / name.split("/")[0] / "c")
        shutil.rmtree(self.store / fmt.COMMITS)
        return self


def many_shards(study: Study, folder: Path, *changes: tuple[str, str]) -> Extraction:
    """The small study with 20 shards of 512 rows, nothing of it made but the model."""
    text = SMALL
    for old, new in (
        ("tokens = 20_000", "tokens = 10_000"),
        ("shard_rows = 4096\nchunk_rows = 256", "shard_rows = 512\nchunk_rows = 128"),
        ('datasets = ["python/text-kind", "python/docstring-of"]', 'datasets = ["python/text-kind"]'),
        ("train_size = 80\ntest_size = 40", "train_size = 20\ntest_size = 10"),
        *changes,
    ):
        assert old in text
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    toml = folder / "small.toml"
    toml.write_text(text)
    plan, workspace = make_plan(Experiment.load(str(toml))), Workspace(folder / "ws")
    if plan.model:
        shutil.copytree(study.workspace.folder(plan.model), workspace.folder(plan.model))
    return Extraction(toml, plan, workspace)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder except manifests, which have a time in them, and locks."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST and ".locks" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def extract_here(toml: str, workspace: str, options: dict[str, Any]) -> None:
    """Extract a study in this process. `made` is a folder for a file per shard written; exit code 3 for a PipelineError."""
    import torch

    from pipeline.extract.extraction import extract
    from pipeline.store.writer import ShardWriter

    torch.set_num_threads(1)
    if made := options.get("made"):
        write = ShardWriter.write

        def noted(self: ShardWriter, shard: int, *arguments: Any, **options: Any) -> Any:
            (Path(made) / f"{os.getpid()}-{self.storage}-{shard}".replace("/", "_")).touch(exist_ok=False)
            return write(self, shard, *arguments, **options)

        ShardWriter.write = noted
    if barrier := options.get("barrier"):
        barrier.wait()
    if limit := options.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        extract(make_plan(Experiment.load(toml)), Workspace(workspace))
    except PipelineError as error:
        Path(options["error"]).write_text(str(error))
        sys.exit(3)


def started(
    extraction: Extraction,
    *,
    made: Path | None = None,
    barrier: Barrier | None = None,
    largest_file: int | None = None,
    error: Path | None = None,
) -> BaseProcess:
    """A process that extracts."""
    options = {"made": made and str(made), "barrier": barrier, "largest_file": largest_file, "error": error and str(error)}
    return forked(extract_here, str(extraction.toml), str(extraction.workspace.root), options)


def forked(function: Callable[..., object], *arguments: object) -> BaseProcess:
    """A process that calls a function. It starts within milliseconds, as a fork of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["extraction_parent"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    process = context.Process(target=function, args=arguments)
    process.start()
    return process
