"""Probes one SAE on the data sets of `sae-probes`, as sae-bench's evaluation `sparse_probing_sae_probes` does.

The texts come with that package. Its functions keep activations in pickled files; here they are replaced by what was
measured once for a layer.
"""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.evaluate.bench import Bench
from pipeline.evaluate.saebench.suite import ModelSide, Suite, running
from pipeline.runtime.compatibility import replaced

AT_ONCE, LONGEST = 32, 1024
"""Texts in a forward pass, and the tokens that are read of each, as `ensure_dataset_activations`."""
BASELINES = "baseline_results_{model}/{setting}_setting"
"""Where sae-probes keeps its scores of the model itself, in its folder of results."""


def sparse_probing_sae_probes(on: Bench) -> dict[str, Any]:
    """The content of `sparse_probing_sae_probes.json`."""
    with running("sparse_probing_sae_probes", on) as suite, suite.scratch() as folder:
        config = suite.config(results_path=str(folder), model_cache_path=str(folder))
        side = suite.model_side(lambda side: _model_side(suite, config, side))
        return _measured(suite, config, side)


def _model_side(suite: Suite, config: Any, side: ModelSide) -> dict[str, Any]:
    """The activation of each text's last token, by data set, and sae-probes' scores of the model itself."""
    from sae_probes import generate_model_activations, run_baseline_evals, utils_data

    model = suite.model("float32")  # sae-probes loads no other
    sides = model.tokenizer.padding_side, model.tokenizer.truncation_side
    found: dict[str, Any] = {}
    for dataset in config.dataset_names:
        table: Any = utils_data.read_numbered_dataset_df(dataset)
        activations = generate_model_activations._process_activations(  # pyright: ignore[reportPrivateUsage]
            model=model, texts=table["prompt"].tolist(), batch_size=AT_ONCE, max_seq_len=LONGEST, hook_names=[suite.hook],
            max_layer=None, device=str(suite.device),
        )  # fmt: skip
        found[dataset] = activations[suite.hook]
        side.write(dataset, {"x_ND": found[dataset]})
    # It sets them and leaves them so; other evaluations use the same model.
    model.tokenizer.padding_side, model.tokenizer.truncation_side = sides
    if not config.include_llm_baseline:
        return {"baselines": {}}
    with _activations_from(found.__getitem__):
        run_baseline_evals(
            model_name=config.model_name, hook_name=suite.hook, setting=config.setting, method=config.baseline_method,
            results_path=config.results_path, model_cache_path=config.model_cache_path, datasets=config.dataset_names,
            device=str(suite.device), seed=config.random_seed,
        )  # fmt: skip
    folder = Path(config.results_path) / BASELINES.format(model=config.model_name, setting=config.setting)
    return {"baselines": {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}}


def _measured(suite: Suite, config: Any, side: ModelSide) -> dict[str, Any]:
    from sae_bench.evals.sparse_probing_sae_probes import main

    folder = Path(config.results_path) / BASELINES.format(model=config.model_name, setting=config.setting)
    folder.mkdir(parents=True, exist_ok=True)
    for name, scores in side.facts["baselines"].items():
        (folder / name).write_text(json.dumps(scores), encoding="utf-8")
    sae = suite.sae("float32")
    numbers = {dataset: number for number, dataset in enumerate(config.dataset_names)}
    with _activations_from(lambda dataset: side.read(numbers[dataset])["x_ND"]):
        found = main.run_eval(config, [(suite.name, sae)], str(suite.device), str(Path(config.results_path) / "out"))
    (output,) = found.values()
    return json.loads(json.dumps(output | {"sae_lens_id": str(suite.on.planned)}, default=str))


@contextmanager
def _activations_from(read: Callable[[str], Any]) -> Generator[None]:
    """While this lasts, sae-probes takes the activations [N, D] of a data set from `read`."""
    # The package has functions of the same names as two of its modules.
    run_baselines, run_sae_evals, utils_data = (
        import_module(f"sae_probes.{name}") for name in ("run_baselines", "run_sae_evals", "utils_data")
    )

    def activations(dataset: str, *_arguments: Any, **_options: Any) -> Any:
        return read(dataset)

    def nothing(*_arguments: Any, **_options: Any) -> None:
        pass

    patches: list[tuple[Any, str, Any]] = [(utils_data, "get_xvals", activations)]
    patches += [(module, "ensure_dataset_activations", nothing) for module in (run_baselines, run_sae_evals, utils_data)]
    with replaced(*patches):
        yield
