"""Runs evaluations of sae-bench by its own functions: settings, the study's model, an exported SAE, what SAEs share, output.

sae-bench measures first what needs the language model alone, such as activations and probes, then the SAE. The first part is
an artefact of its own here (`ModelSide`), so that it is computed once for a model and a layer.
"""

import json
import random
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType] - takes a bare PathLike

from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.storage import write_atomically
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import EvaluationError, PipelineError, in_one_line
from pipeline.evaluate.bench import Bench, LayerBench
from pipeline.models.hooked import hooked_model
from pipeline.runtime.compatibility import data_sets_in, importing_sae_bench, quiet_sae_bench
from pipeline.runtime.devices import best_device
from pipeline.sae.formats import CONFIG, to_saelens
from pipeline.study.saebench_section import SAEBENCH, check_needs, sae_bench_config
from pipeline.study.study_model import study_model

Tensors = dict[str, torch.Tensor]
MODEL_SIDE = "model_side.json"
SCRATCH = "scratch-"


@dataclass(frozen=True)
class Suite:
    """One of sae-bench's evaluations, of one SAE."""

    name: str
    on: Bench

    def config(self, **ours: Any) -> Any:
        """sae-bench's settings: those of the study, the experiment's, sae-bench's own. `ours` is what the study fixes."""
        experiment = self.on.layer.experiment
        settings: dict[str, Any] = {"llm_dtype": experiment.model.dtype, "llm_batch_size": experiment.store.forward_batch}
        settings |= {"context_length": experiment.store.context, "context_size": experiment.store.context}
        known = {name for name in settings if name in _fields(self.name)}
        settings = {name: settings[name] for name in known} | experiment.saebench.of(self.name) | ours
        return sae_bench_config(self.name, model_name=Path(experiment.model.name).name, **settings)

    @property
    def hook(self) -> str:
        """TransformerLens' name of the place that the SAE reads."""
        return f"blocks.{self.on.layer.layer}.hook_resid_post"

    @property
    def device(self) -> torch.device:
        """Where sae-bench computes."""
        return best_device(self.on.layer.experiment.run.device)

    def model(self, dtype: str) -> Any:
        """The study's model as a HookedTransformer, loaded once for the SAEs of a layer."""
        models = self.on.layer.once(_no_models)
        if dtype not in models:
            name, revision = study_model(self.on.layer.plan, self.on.layer.workspace)
            models[dtype] = hooked_model(name, revision=revision, dtype=dtype, device=self.device)
        return models[dtype]

    @contextmanager
    def scratch(self) -> Generator[Path]:
        """A folder in the workspace for what sae-bench writes, removed afterwards."""
        own = self.on.layer.workspace.folder(self.on.planned.apart[self.name])
        with TemporaryDirectory(dir=own, prefix=SCRATCH) as temporary:
            yield Path(temporary)

    @contextmanager
    def exported(self) -> Generator[Path]:
        """A folder with the SAE as `dasae export` writes it, with the names that sae-bench asks for."""
        with self.scratch() as temporary:
            folder = temporary / "sae"
            workspace, artefact = self.on.layer.workspace, self.on.planned.artefact
            to_saelens(workspace.fetched(artefact), folder, artefact.name)
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            config["metadata"] |= {
                "hook_name": self.hook,
                "model_name": Path(self.on.layer.experiment.model.name).name,
                "context_size": self.on.layer.experiment.store.context,
                "prepend_bos": True,
            }
            (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
            yield folder

    def sae(self, dtype: str) -> Any:
        """The exported SAE as SAELens loads it, as sae-bench wants it."""
        import sae_lens
        from sae_bench.sae_bench_utils import general_utils

        with self.exported() as folder:
            sae: Any = cast("Any", sae_lens.SAE).load_from_disk(str(folder), device=str(self.device))
        general_utils.load_and_format_sae(self.name, sae, str(self.device))  # completes its configuration
        return sae.to(device=self.device, dtype=general_utils.str_to_dtype(dtype))

    def model_side(self, make: Callable[["ModelSide"], Mapping[str, Any]]) -> "ModelSide":
        """What the SAEs of this layer share. `make` writes the tensors, and returns the rest: JSON."""
        layer = self.on.layer
        artefact = layer.plan.model_sides[self.name, layer.layer]
        side = ModelSide(artefact, layer.workspace)
        with layer.workspace.lock(artefact):
            if layer.workspace.manifest(artefact) is None:
                started = time.monotonic()
                side.publish(make(side), started)
        return side

    def output(self, of: Callable[..., Any], config: Any, sae: Any, **results: Any) -> dict[str, Any]:
        """sae-bench's JSON, validated by its own class `of`."""
        output = of(
            eval_config=config,
            eval_id=str(uuid.uuid4()),
            datetime_epoch_millis=int(time.time() * 1000),
            sae_bench_commit_hash=f"sae-bench {version('sae-bench')}",
            sae_lens_id=str(self.on.planned),
            sae_lens_release_id="direction-aware-sae",
            sae_lens_version=version("sae-lens"),
            sae_cfg_dict=sae.cfg.to_dict(),
            **results,
        )
        return json.loads(json.dumps(asdict(output), default=str))


class ModelSide:
    """The artefact of what an evaluation takes from the language model alone: groups of tensors by name, and JSON."""

    def __init__(self, artefact: Artefact, workspace: Workspace):
        self.artefact, self.workspace = artefact, workspace
        self._files: list[str] = []

    def write(self, group: str, tensors: Tensors) -> None:
        """Add a group. Names of tensors may be any."""
        name = f"{len(self._files)}.safetensors"
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, self._folder / name, {"group": group}
        )
        self._files.append(name)

    def read(self, number: int) -> Tensors:
        """The group that was written as the `number`th, verified."""
        return load_file(self.workspace.verified(self.artefact, f"{number}.safetensors"))

    @property
    def facts(self) -> dict[str, Any]:
        """What `make` returned."""
        return json.loads(self.workspace.verified(self.artefact, MODEL_SIDE).read_text(encoding="utf-8"))

    def publish(self, facts: Mapping[str, Any], started: float) -> None:
        """Make it an artefact."""
        write_atomically(self._folder / MODEL_SIDE, json.dumps(facts, allow_nan=False).encode())
        seconds = round(time.monotonic() - started, 1)
        self.workspace.publish(self.artefact, files=[MODEL_SIDE, *self._files], facts={"seconds": seconds})

    @property
    def _folder(self) -> Path:
        return self.workspace.folder(self.artefact)


@contextmanager
def running(name: str, on: Bench) -> Generator[Suite]:
    """Run sae-bench's code: quiet, with the study's local data sets, and without a trace on the random numbers of others.

    Raises EvaluationError, in one line, for whatever goes wrong in it, and BadInputError where a key is missing.
    """
    check_needs(name)
    for left in on.layer.workspace.folder(on.planned.apart[name]).glob(f"{SCRATCH}*"):  # of a process that was killed
        rmtree(left)
    states = random.getstate(), torch.is_grad_enabled()
    try:
        with ExitStack() as around:
            around.enter_context(importing_sae_bench())
            around.enter_context(cast("Any", torch.random.fork_rng)())
            around.enter_context(quiet_sae_bench())
            around.enter_context(data_sets_in(on.layer.experiment.saebench.local))  # imports sae-bench
            yield Suite(name, on)
    except (PipelineError, MemoryError):
        raise
    except Exception as error:  # sae-bench asserts, and its libraries raise what they like
        needs = SAEBENCH[name].needs
        remedy = f"; it needs {needs}" if needs else ""
        raise EvaluationError(f"{name} failed in sae-bench: {type(error).__name__}: {in_one_line(error)}{remedy}") from error
    finally:
        random.setstate(states[0])
        torch.set_grad_enabled(states[1])


def seed(number: int) -> None:
    """As sae-bench does before it measures an SAE."""
    random.seed(number)
    torch.manual_seed(number)


def _fields(name: str) -> set[str]:
    return {field.name for field in fields(sae_bench_config(name))}


def _no_models(_: LayerBench) -> dict[str, Any]:
    return {}
