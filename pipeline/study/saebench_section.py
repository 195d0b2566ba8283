"""Defines the section [saebench], the settings of sae-bench's evaluations, and the table of those that can be asked for."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from pipeline.artefacts.identity import fingerprint
from pipeline.errors import BadInputError
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.section import Section

Settings = dict[str, Any]
"""Fields of the configuration that sae-bench defines for an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Offered:
    """An evaluation of sae-bench, as a study can ask for it."""

    config: str
    """sae-bench's class of its settings, as "module:name"."""
    ours: frozenset[str] = frozenset()
    """Settings that follow from the study, so that nobody may set them."""
    data: str | None = None
    """The setting that names the data sets it loads."""
    key: str | None = None
    """Environment variable that must hold a key. It is read when the evaluation runs, and stored nowhere."""
    needs: str | None = None
    """What one has to have that a study cannot bring, in words."""
    minutes: int | None = None
    """What an SAE of 16,384 latents of Gemma-2-2B takes on an RTX 3090 (README of sae-bench)."""


def _offered(config: str, *ours: str, **more: Any) -> Offered:
    return Offered(config=f"sae_bench.evals.{config}", ours=frozenset({"model_name", *ours}), **more)


SAEBENCH: Mapping[str, Offered] = {
    "core": _offered("core.eval_config:CoreEvalConfig", data="dataset", minutes=9),
    "scr": _offered("scr_and_tpp.eval_config:ScrAndTppEvalConfig", "perform_scr", data="dataset_names", minutes=6),
    "tpp": _offered("scr_and_tpp.eval_config:ScrAndTppEvalConfig", "perform_scr", data="dataset_names", minutes=2),
    "absorption": _offered("absorption.eval_config:AbsorptionEvalConfig", minutes=26),
    "meta_structure": _offered("meta_structure.eval_config:MetaStructureEvalConfig"),
    "sparse_probing_sae_probes": _offered(
        "sparse_probing_sae_probes.eval_config:SparseProbingSaeProbesEvalConfig",
        "results_path",
        "model_cache_path",
        "setting",
    ),
    "ravel": _offered(
        "ravel.eval_config:RAVELEvalConfig",
        needs="one of the models that sae-bench has prompts for, such as gemma-2-2b, by that name",
        minutes=45,
    ),
    "unlearning": _offered(
        "unlearning.eval_config:UnlearningEvalConfig",
        needs="an instruction-tuned model and the corpus bio_forget_dataset.jsonl, for which its authors give access",
        minutes=10,
    ),
    "autointerp": _offered("autointerp.eval_config:AutoInterpEvalConfig", key="OPENAI_API_KEY", minutes=9),
}
"""By the name in `[evaluate] saebench`."""


class SAEBenchConfig(Section):
    """Settings of sae-bench's evaluations, one table each. A field that is not set is as sae-bench has it."""

    data: Annotated[str | None, Field(min_length=1)] = None
    """A folder with data sets under their names on the Hub, such as `canrager/amazon_reviews_mcauley_1and5`. What is not in
    it comes from the Hub."""
    core: Settings = Field(default_factory=dict[str, Any])
    """Reconstruction, loss and sparsity."""
    scr: Settings = Field(default_factory=dict[str, Any])
    """Spurious correlation removal."""
    tpp: Settings = Field(default_factory=dict[str, Any])
    """Targeted probe perturbation."""
    absorption: Settings = Field(default_factory=dict[str, Any])
    """Absorption of first-letter features."""
    meta_structure: Settings = Field(default_factory=dict[str, Any])
    """Composition: how well a smaller SAE explains the decoder."""
    sparse_probing_sae_probes: Settings = Field(default_factory=dict[str, Any])
    """The probes of `sae-probes`, on more than a hundred data sets."""
    ravel: Settings = Field(default_factory=dict[str, Any])
    """Disentanglement of attributes."""
    unlearning: Settings = Field(default_factory=dict[str, Any])
    """Unlearning by clamping latents."""
    autointerp: Settings = Field(default_factory=dict[str, Any])
    """Explanations of latents by a language model."""

    @model_validator(mode="after")
    def _known_to_sae_bench(self) -> Self:
        for name, offered in SAEBENCH.items():
            if settings := self.of(name):  # sae-bench takes seconds to import
                _check(name, offered, settings)
        if self.data and not Path(self.data).is_dir():
            raise ValueError(f"data: {self.data} is not a folder")
        return self

    def of(self, name: str) -> Settings:
        """The settings of an evaluation."""
        return getattr(self, name)

    def inputs(self, name: str) -> dict[str, Any]:
        """What determines an evaluation's results beside the model and the SAE: settings, and the content of local data."""
        settings, setting = dict(self.of(name)), SAEBENCH[name].data
        return {"settings": settings} | ({"data": self._content(settings.get(setting))} if setting else {})

    def local(self, dataset: str) -> Path | None:
        """The folder of a data set that lies in `data`, or is a folder itself; None for one of the Hub."""
        places = [Path(self.data) / dataset.partition("_class_set")[0].removesuffix("_sentiment")] if self.data else []
        return next((place for place in (*places, Path(dataset)) if place.is_dir()), None)

    def _content(self, named: str | list[str] | None) -> dict[str, str]:
        """Hashes of the data sets that lie here, by name. sae-bench pins no revision, so a name identifies the others."""
        if named is None:
            found = Path(self.data).glob("*/*") if self.data else ()
            named = sorted(path.relative_to(str(self.data)).as_posix() for path in found)
        places = {name: self.local(name) for name in ([named] if isinstance(named, str) else named)}
        return {name: _fingerprint(place) for name, place in places.items() if place}


def check_needs(name: str) -> None:
    """Raise BadInputError where an evaluation needs a key that the environment does not have."""
    key = SAEBENCH[name].key
    if key and not os.environ.get(key):
        raise BadInputError(f"evaluate.saebench: {name} needs a key in the environment variable {key}; set it, or remove it")


def sae_bench_config(name: str, **settings: Any) -> Any:
    """An object of the class that sae-bench defines for the settings of an evaluation. Raises TypeError or ValueError."""
    with importing_sae_bench():
        return resolve_name(SAEBENCH[name].config)(**settings)


def _check(name: str, offered: Offered, settings: Settings) -> None:
    with importing_sae_bench():
        known = {field.name for field in fields(resolve_name(offered.config))} - offered.ours
    for field in settings:
        if field not in known:
            raise ValueError(f"{name}.{field}: unknown key; sae-bench has {', '.join(sorted(known))}")
    try:
        sae_bench_config(name, **settings)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in problem["loc"])
        raise ValueError(
            f"{name}.{path}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"
        ) from None


def _fingerprint(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return fingerprint((path.relative_to(folder).as_posix(), path) for path in files)
