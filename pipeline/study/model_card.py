"""Writes the model card of an exported SAE: what it is, how it was trained, what was measured, how to load it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pipeline
from pipeline.artefacts.identity import sha256
from pipeline.artefacts.manifest import Manifest, read_manifest
from pipeline.artefacts.storage import LocalStorage
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import CorruptArtefactError
from pipeline.sae.formats import read_config
from pipeline.study.evaluations import EVALUATIONS

LICENCE = "The terms of the model and of the texts it was trained on may apply to it. State its own licence here."
CITED = f"direction-aware-sae {pipeline.__version__}"
PLAIN = ("d_in", "d_sae", "architecture")
"""Entries of `cfg.json` that every SAE has."""
MEASURED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("reconstruction", "FVU on held-out rows", ("fvu",)),
    ("reconstruction", "L0 on held-out rows", ("l0",)),
    ("reconstruction", "share of latents that fire on none", ("dead_fraction",)),
    ("loss", "loss recovered, against zeros", ("recovered", "zero")),
    ("sparse_probing", "sparse probing, k = 1", ("eval_result_metrics", "sae", "sae_top_1_test_accuracy")),
    ("sparse_probing", "sparse probing, k = 5", ("eval_result_metrics", "sae", "sae_top_5_test_accuracy")),
)
"""Numbers of an evaluation: its entry in the table, what the card calls the number, path in the file."""


def measured(workspace: Workspace, label: str, key: str) -> dict[str, float]:
    """What the workspace's evaluation of an SAE says, by name; {} where it was not evaluated, or that is damaged."""
    found: dict[str, float] = {}
    for name in workspace.finished("evaluations"):
        if not name.startswith(f"{label}-"):
            continue
        place = workspace.place(f"evaluations/{name}")
        try:
            manifest = read_manifest(place, "")
            if manifest and manifest.inputs.get("sae") == key:
                files = {entry: EVALUATIONS[entry].file for entry, _, _ in MEASURED}
                whole = {entry: file for entry, file in files.items() if file in manifest.files}
                read = {entry: place.read(file) for entry, file in whole.items()}
                content = {
                    entry: json.loads(data) for entry, data in read.items() if _unchanged(data, whole[entry], manifest)
                }
                found |= {
                    what: value for entry, what, path in MEASURED if (value := _at(content.get(entry), path)) is not None
                }
        except (CorruptArtefactError, FileNotFoundError, ValueError):
            continue
    return found


def _unchanged(data: bytes, file: str, manifest: Manifest) -> bool:
    return sha256(data) == manifest.files[file].sha256


def _at(content: Any, path: tuple[str, ...]) -> float | None:
    for part in path:
        content = cast("dict[str, Any]", content).get(part) if isinstance(content, dict) else None
    return content


def model_card(folder: Path, workspace: Workspace) -> str:
    """The card of the finished SAE in a folder, with the front matter that the Hugging Face Hub reads.

    Its numbers are those of the workspace's evaluation of it, if there is one.
    """
    manifest = read_manifest(LocalStorage(folder), f"delete {folder} and train it again")
    assert manifest is not None  # `find` looked
    config, name = read_config(folder), folder.resolve().name
    numbers = measured(workspace, name.rpartition("-")[0], manifest.key)
    return (
        "\n".join(
            [
                *_front(str(config["metadata"].get("model_name", ""))),
                *_described(name, config),
                *_recipe(manifest),
                *_numbers(numbers),
                *_end(name),
            ]
        )
        + "\n"
    )


def study_card(name: str, description: str, model: str, saes: Mapping[str, Path], workspace: Workspace) -> str:
    """The card of a repository with the SAEs of a study, by their folder in it."""
    lines = [*_front(model), f"# {name}", "", description, ""]
    lines += ["| folder | FVU | L0 |", "|---|---|---|"]
    for place, folder in saes.items():
        manifest, label = read_manifest(LocalStorage(folder), ""), folder.resolve().name.rpartition("-")[0]
        numbers = measured(workspace, label, manifest.key) if manifest else {}
        shown = (numbers.get(f"{what} on held-out rows") for what in ("FVU", "L0"))
        lines.append(f"| {place} | {' | '.join('' if number is None else f'{number:.4g}' for number in shown)} |")
    use = 'sae = SAE.from_pretrained("OWNER/NAME", "FOLDER")'
    lines += ["", "## Use", "", "```python", "from sae_lens import SAE", "", use, "```", ""]
    lines += ["Each folder has a card of its own: recipe, and what was measured.", ""]
    return "\n".join([*lines, "## Licence", "", LICENCE, "", "## Citation", "", f"{CITED}, study {name}.", ""])


def _front(model: str) -> Iterator[str]:
    yield from ("---", "library_name: sae_lens", "tags:", "- sparse-autoencoder", "- interpretability")
    if model.count("/") == 1 and not Path(model).exists():
        yield f"base_model: {model}"
    yield "---"


def _described(name: str, config: Mapping[str, Any]) -> Iterator[str]:
    metadata = config["metadata"]
    yield from (f"# {name}", "", f"A sparse autoencoder of {Path(str(metadata.get('model_name', 'a model'))).name}.", "")
    facts = {field: config[field] for field in PLAIN} | {
        field: metadata[field] for field in ("hook_name", "arm", "seed") if field in metadata
    }
    yield from _table(facts)


def _recipe(manifest: Manifest) -> Iterator[str]:
    recipe = manifest.inputs.get("recipe")
    yield from ("## Training", "")
    if not isinstance(recipe, dict):
        yield from ("It was not trained by direction-aware-sae.", "")
        return
    yield from (f"By direction-aware-sae {manifest.versions.get('direction-aware-sae', '')}, with this recipe:", "")
    yield from ("```json", json.dumps(recipe, indent=1), "```", "")


def _numbers(numbers: Mapping[str, float]) -> Iterator[str]:
    yield from ("## Measured", "")
    if not numbers:
        yield from ("Nothing: it was not evaluated.", "")
        return
    yield from ("On the texts of the study that trained it. These numbers say nothing about other texts.", "")
    yield from _table({name: f"{value:.4g}" for name, value in numbers.items()})


def _end(name: str) -> Iterator[str]:
    yield from ("## Use", "", "```python", "from sae_lens import SAE", "", 'sae = SAE.load_from_disk("FOLDER")', "```", "")
    yield from ("Latents are in the unit of the activations, and decoder rows have norm 1.", "")
    yield from ("## Licence", "", LICENCE, "")
    yield from ("## Citation", "", f"{CITED}, SAE {name}.")


def _table(facts: Mapping[str, Any]) -> Iterator[str]:
    yield from ("| | |", "|---|---|")
    yield from (f"| {name} | {value} |" for name, value in facts.items())
    yield ""
