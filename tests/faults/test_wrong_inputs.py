"""A model that computes nonsense, and a store that is another one's: refused, and nothing of it is kept."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from faulty import Extraction, files_of, many_shards
from safetensors.torch import load_file, save_file
from small_study import Study

from pipeline.artefacts.manifest import MANIFEST
from pipeline.errors import BadInputError, PipelineError
from pipeline.extract.extraction import extract
from pipeline.store import format as fmt
from pipeline.store.reader import ActivationStore


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_norm", ["", "max_norm = 10.0"])
def test_a_model_that_puts_out_no_numbers_stops_at_the_sequence(
    study: Study, finished: Extraction, value: float, max_norm: str, tmp_path: Path
) -> None:
    assert study.plan.model is not None
    poisoned = tmp_path / "poisoned"
    shutil.copytree(study.workspace.folder(study.plan.model), poisoned)
    text = fmt.read_sequences(finished.workspace.storage(finished.plan.store))
    used, first = np.unique(text.tokens_SL[:250], return_index=True)
    token = int(used[first.argmax()])  # the one that comes latest in what is extracted
    sequences = np.flatnonzero((text.tokens_SL == token).any(axis=1))
    weights = load_file(poisoned / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    weights[name][token] = value
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})

    tiny = 'source = "tiny"\nsteps = 150\nbatch_size = 8\nvocabulary = 512'
    local = f'source = "huggingface"\nname = "{poisoned}"\nd_in = 64\ndepth = 4\ndtype = "float32"'
    extraction = many_shards(study, tmp_path, (tiny, local), ("[store]", f"[store]\n{max_norm}"))
    with pytest.raises(PipelineError, match="values that are not finite for sequence") as stopped:
        extract(extraction.plan, extraction.workspace)
    named = int(str(stopped.value).split("for sequence ")[1].split()[0])
    assert named in sequences
    # Masked attention multiplies by 0, which leaves NaN what it is: the sequence is lost from its first row on.
    lost = int(text.row_offsets[sequences[0]]) // 512
    assert lost > 5
    kept = ActivationStore(extraction.store, partial=True)
    assert kept.shards == list(range(lost))
    for shard in kept.shards:
        assert kept.read(2, *kept.row_range(shard)).isfinite().all()


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        ("layers = [1, 2]", "layers = [0, 2]"),
        ("context = 32\nshard_rows", "context = 24\nshard_rows"),
        ("vocabulary = 512", "vocabulary = 640"),
    ],
    ids=["layers", "context", "tokenizer"],
)
def test_the_store_of_another_study_is_refused_and_left_alone(
    study: Study, finished: Extraction, change: tuple[str, str], complete: bool, tmp_path: Path
) -> None:
    other = finished.copy(tmp_path / "ws")
    text = other.toml.read_text()
    assert change[0] in text
    toml = tmp_path / "small.toml"
    toml.write_text(text.replace(*change))
    from pipeline.study.experiment import Experiment
    from pipeline.study.plan import make_plan

    plan = make_plan(Experiment.load(str(toml)))
    assert plan.store.key != other.plan.store.key
    if plan.model != other.plan.model:
        assert plan.model is not None
        assert other.plan.model is not None
        shutil.copytree(other.workspace.folder(other.plan.model), other.workspace.folder(plan.model))
        with pytest.raises(BadInputError, match=f"holds the artefact {other.plan.model.key}, which does not belong to this"):
            extract(plan, other.workspace)
        return
    mistaken = other.workspace.folder(plan.store)
    other.store.rename(mistaken)
    if not complete:
        (mistaken / MANIFEST).unlink()
    before = files_of(mistaken)
    with pytest.raises(BadInputError, match=f"artefact {other.plan.store.key}, .*; move it away and run again"):
        extract(plan, other.workspace, deep=True)
    assert files_of(mistaken) == before
