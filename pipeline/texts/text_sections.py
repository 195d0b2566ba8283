"""Defines the sections [corpus] and [probes] of an experiment: the texts that a study reads."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from pipeline.section import COMMIT, Section, Seed, needs_commit


class PythonCorpus(Section):
    """Text of the Python installation: docstrings, sources and the language reference, read with `ast`."""

    source: Literal["python"]


class FilesCorpus(Section):
    """Texts in files on this machine. Their content identifies them, not their path."""

    source: Literal["files"]
    paths: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    """Files, or patterns such as `texts/**/*.parquet`: .parquet, .jsonl, or .txt (one document per file). They are read in
    sorted order, each once."""
    text_column: str = "text"
    """Column of a parquet file, key of a JSON line."""


class HuggingFaceCorpus(Section):
    """A text data set that is streamed from the Hugging Face Hub."""

    source: Literal["huggingface"]
    name: Annotated[str, Field(min_length=1)]
    """Repository such as `monology/pile-uncopyrighted`."""
    revision: str | None = None
    """Commit of the repository; required, because a branch may move."""
    split: str = "train"
    text_column: str = "text"

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if Path(self.name).exists():  # `datasets` would prefer it to the Hub
            raise ValueError(f'{self.name!r} is a path on this machine: use source = "files" and paths = [...]')
        if not COMMIT.fullmatch(self.revision or ""):
            raise ValueError(f"{self.name!r} {needs_commit(f'datasets/{self.name}', self.revision)}")
        return self


class _Part(Section):
    weight: PositiveFloat
    """Share of the characters of the mixture, beside the other parts' weights."""


class PythonPart(PythonCorpus, _Part):
    """Text of the Python installation, as a part of a mixture."""


class FilesPart(FilesCorpus, _Part):
    """Texts in files, as a part of a mixture."""


class HuggingFacePart(HuggingFaceCorpus, _Part):
    """A streamed data set, as a part of a mixture."""


Part = Annotated[PythonPart | FilesPart | HuggingFacePart, Field(discriminator="source")]


class MixedCorpus(Section):
    """Several corpora, interleaved document by document so that each has its share of the characters at every place.

    The mixture ends where one of its parts ends.
    """

    source: Literal["mixture"]
    parts: Annotated[tuple[Part, ...], Field(min_length=2)]


class SyntheticCorpus(Section):
    """No text: rows are drawn from the synthetic model, and [model] has all parameters."""

    source: Literal["synthetic"]


TextCorpus = PythonCorpus | FilesCorpus | HuggingFaceCorpus | MixedCorpus
CorpusConfig = Annotated[TextCorpus | SyntheticCorpus, Field(discriminator="source")]

SAE_BENCH_DATASETS = (
    "LabHC/bias_in_bios_class_set1",
    "LabHC/bias_in_bios_class_set2",
    "LabHC/bias_in_bios_class_set3",
    "canrager/amazon_reviews_mcauley_1and5",
    "canrager/amazon_reviews_mcauley_1and5_sentiment",
    "codeparrot/github-code",
    "fancyzhx/ag_news",
    "Helsinki-NLP/europarl",
)
"""The data sets that sae-bench can load."""


class ProbesConfig(Section):
    """Labelled texts for sparse probing. The defaults are sae-bench's published configuration."""

    datasets: tuple[str, ...] = SAE_BENCH_DATASETS
    """sae-bench's names, `python/...` tasks made from the Python installation, or folders that hold `train.parquet` and
    `test.parquet` with the columns `text` and `label`. Empty for a synthetic model."""
    train_size: Annotated[int, Field(ge=8)] = 4000
    """Training texts of one binary probe, half of them of its class (sae-bench's `probe_train_set_size`)."""
    test_size: Annotated[int, Field(ge=8)] = 1000
    """Test texts of one binary probe, half of them of its class."""
    context: Annotated[int, Field(ge=8)] = 128
    """Tokens per text, BOS included; longer texts are cut."""
    seed: Seed = 42

    @property
    def named(self) -> dict[str, str]:
        """Data sets by their name in artefacts and reports (`probe_name`)."""
        return {probe_name(dataset): dataset for dataset in self.datasets}

    @model_validator(mode="after")
    def _told_apart(self) -> Self:
        names = [probe_name(dataset) for dataset in self.datasets]
        for name in names:
            if names.count(name) > 1:
                same = [dataset for dataset in self.datasets if probe_name(dataset) == name]
                raise ValueError(f"datasets: {' and '.join(same)} are both called {name!r} in reports; rename or remove one")
        return self


def is_probe_folder(dataset: str) -> bool:
    """Whether a probe data set is a folder on this machine."""
    return any((Path(dataset) / f"{split}.parquet").is_file() for split in ("train", "test"))


def probe_name(dataset: str) -> str:
    """The name of a probe data set in artefacts and reports: a folder's own name, otherwise the name in the experiment."""
    return Path(dataset).resolve().name if is_probe_folder(dataset) else dataset
