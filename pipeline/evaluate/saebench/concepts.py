"""Measures spurious correlation removal (SCR) and targeted probe perturbation (TPP) of one SAE, as sae-bench does.

Both ablate the latents that matter most to a probe of a concept (SAEBench, arXiv 2503.09532, section 4). SCR asks whether
that takes a spurious concept out of a probe, TPP whether it hurts the probes of other concepts less.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from pipeline.evaluate.bench import Bench
from pipeline.evaluate.saebench.suite import ModelSide, Suite, Tensors, running, seed
from pipeline.runtime.compatibility import importing_sae_bench

Accuracies = dict[str, float]
Key = tuple[str, int]
"""The class whose latents are ablated, and how many."""


@dataclass(frozen=True)
class Run:
    """One data set. For SCR also the pair of its first column that stands for professor and nurse in sae-bench's names."""

    dataset: str
    pair: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        """sae-bench's name of its results."""
        return f"{self.dataset}_scr_{self.pair[0]}_{self.pair[1]}" if self.pair else f"{self.dataset}_tpp"


def scr(on: Bench) -> dict[str, Any]:
    """The content of `scr.json`."""
    with running("scr", on) as suite:
        return _measured(suite, suite.config(perform_scr=True))


def tpp(on: Bench) -> dict[str, Any]:
    """The content of `tpp.json`."""
    with running("tpp", on) as suite:
        return _measured(suite, suite.config(perform_scr=False))


def _measured(suite: Suite, config: Any) -> dict[str, Any]:
    from sae_bench.sae_bench_utils import general_utils

    side = suite.model_side(lambda side: _model_side(suite, config, side))
    sae = suite.sae(config.llm_dtype)
    results: dict[str, dict[str, float]] = {}
    by_class: dict[str, Any] = {}
    seed(config.random_seed)
    with torch.no_grad():
        for number, run in enumerate(_runs(config)):
            clean = side.facts["accuracies"][number]
            ablated = _ablated(sae, config, run, _Concepts.of(side.read(number), suite.device))
            results[f"{run.name}_results"], by_class[run.dataset] = _scored(ablated, clean, config)
    overall = general_utils.average_results_dictionaries(results, [run.name for run in _runs(config)])
    return _output(suite, config, sae, overall, results, by_class)


def _runs(config: Any) -> Iterator[Run]:
    for dataset in config.dataset_names:
        if config.perform_scr:
            yield from (Run(dataset, tuple(pair)) for pair in config.column1_vals_lookup[dataset])
        else:
            yield Run(dataset)


@dataclass(frozen=True)
class _Concepts:
    """Activations [S, L, D] of both splits by class, 0 at padding and special tokens, and a probe of each class."""

    train: Tensors
    test: Tensors
    probes: Mapping[str, Any]

    @classmethod
    def of(cls, tensors: Tensors, device: torch.device) -> "_Concepts":
        from sae_bench.evals.sparse_probing.probe_training import Probe

        groups: dict[str, Tensors] = {"train": {}, "test": {}, "weight": {}, "bias": {}}
        for name, tensor in tensors.items():
            group, _, key = name.partition("/")
            groups[group][key] = tensor.to(device)
        probes: dict[str, Any] = {}
        with torch.random.fork_rng(devices=[]):  # sae-bench unpickles its probes, which draws no random numbers
            for key, weight_1D in groups["weight"].items():
                probes[key] = Probe(weight_1D.shape[1], weight_1D.dtype).to(device)
                probes[key].net.load_state_dict({"weight": weight_1D, "bias": groups["bias"][key]})
        return cls(groups["train"], groups["test"], probes)

    def tensors(self) -> Tensors:
        """All of it, by name."""
        named = {f"train/{key}": value for key, value in self.train.items()}
        named |= {f"test/{key}": value for key, value in self.test.items()}
        named |= {f"weight/{key}": probe.net.weight for key, probe in self.probes.items()}
        return named | {f"bias/{key}": probe.net.bias for key, probe in self.probes.items()}


def _model_side(suite: Suite, config: Any, side: ModelSide) -> dict[str, Any]:
    """Activations and probes of every run, with sae-bench's random numbers."""
    accuracies: list[Accuracies] = []
    silent = _Silent(max(config.n_values), suite.on.layer.experiment.model.d_in, config.llm_dtype, suite.device)
    seed(config.random_seed)
    for run in _runs(config):
        concepts, clean = _probed(suite, config, run)
        side.write(run.name, concepts.tensors())
        accuracies.append(clean)
        # sae-bench measures its first SAE between two runs, which draws random numbers; which SAE it is changes none.
        _ablated(silent, config, run, concepts)
    return {"accuracies": accuracies}


def _probed(suite: Suite, config: Any, run: Run) -> tuple[_Concepts, Accuracies]:
    from sae_bench.evals.scr_and_tpp import main
    from sae_bench.evals.sparse_probing import probe_training
    from sae_bench.sae_bench_utils import activation_collection

    classes = _classes(run)
    second: Any = main.COLUMN2_VALS_LOOKUP[run.dataset] if run.pair else None
    with torch.no_grad():
        train, test = main.get_dataset_activations(
            run.dataset, config, suite.model(config.llm_dtype), config.llm_batch_size, suite.on.layer.layer, suite.hook,
            str(suite.device), classes, run.pair, second,
        )  # fmt: skip
        pooled_train, pooled_test = map(activation_collection.create_meaned_model_activations, (train, test))
    with torch.enable_grad():
        probes, _ = probe_training.train_probe_on_activations(
            pooled_train,
            pooled_test,
            select_top_k=None,
            use_sklearn=False,
            batch_size=config.probe_train_batch_size,
            epochs=config.probe_epochs,
            lr=config.probe_lr,
            perform_scr=config.perform_scr,
            early_stopping_patience=config.early_stopping_patience,
            l1_penalty=config.probe_l1_penalty,
        )
    with torch.no_grad():
        clean = main.get_probe_test_accuracy(
            probes,  # pyright: ignore[reportArgumentType] - all of them are linear here
            classes, pooled_test, config.probe_test_batch_size, config.perform_scr,
        )  # fmt: skip
    return _Concepts(train, test, probes), clean


@torch.no_grad()
def _ablated(sae: Any, config: Any, run: Run, concepts: _Concepts) -> dict[str, Any]:
    """Accuracies of all probes with the latents of one class ablated, by that class, number of latents and probe."""
    from sae_bench.evals.scr_and_tpp import main

    classes, probes = _classes(run), cast("Any", concepts.probes)
    effects = main.get_all_node_effects_for_one_sae(
        sae, probes, classes, config.perform_scr, concepts.train, config.sae_batch_size
    )
    # By class and number of latents, in sae-bench's order.
    chosen = {
        (name, number): main.select_top_n_features(effects[name], number, name)
        for name in classes
        for number in config.n_values
    }
    pooled = {key: dict[str, torch.Tensor]() for key in chosen}
    for name, acts_SLD in concepts.test.items():
        for key, acts_SD in _without(sae, acts_SLD, chosen, config.sae_batch_size).items():
            pooled[key][name] = acts_SD
    accuracies: dict[str, dict[int, Accuracies]] = {name: {} for name in classes}
    for name, number in chosen:
        accuracies[name][number] = main.get_probe_test_accuracy(
            probes, classes, pooled[name, number], config.probe_test_batch_size, config.perform_scr
        )
    return accuracies


def _without(sae: Any, acts_SLD: torch.Tensor, chosen: Mapping[Key, torch.Tensor], at_once: int) -> dict[Key, torch.Tensor]:
    """Pooled activations [S, D] with some latents ablated, for each choice of latents.

    As `ablated_precomputed_activations`, which encodes and decodes the same activations anew for each choice.
    """
    parts: dict[Key, list[torch.Tensor]] = {key: [] for key in chosen}
    for some_BLD in torch.split(acts_SLD, at_once):
        count_B1 = (some_BLD.sum(dim=-1) != 0).to(some_BLD.dtype).sum(dim=-1, keepdim=True)
        f_BLF = sae.encode(some_BLD)
        error_BLD = some_BLD - sae.decode(f_BLF)
        for key, ablated_F in chosen.items():
            with _without_rows(sae.W_dec.data, ablated_F):
                parts[key].append((sae.decode(f_BLF) + error_BLD).sum(dim=1) / count_B1)
    return {key: torch.cat(part) for key, part in parts.items()}


@contextmanager
def _without_rows(W_dec_FD: torch.Tensor, ablated_F: torch.Tensor) -> Generator[None]:
    """Zero the directions of some latents instead of the latents on every token: the same sums, and much less to write."""
    before = W_dec_FD[ablated_F]
    W_dec_FD[ablated_F] = 0.0
    try:
        yield
    finally:
        W_dec_FD[ablated_F] = before


def _classes(run: Run) -> list[str]:
    from sae_bench.sae_bench_utils import dataset_info

    return list(dataset_info.PAIRED_CLASS_KEYS) if run.pair else dataset_info.chosen_classes_per_dataset[run.dataset]


def _scored(ablated: dict[str, Any], clean: Accuracies, config: Any) -> tuple[dict[str, float], dict[str, Any]]:
    from sae_bench.evals.scr_and_tpp import main

    if config.perform_scr:
        return main.get_scr_plotting_dict(ablated, clean), {}
    return main.create_tpp_plotting_dict(ablated, clean)


def _output(
    suite: Suite, config: Any, sae: Any, overall: Mapping[str, float], results: Mapping[str, Any], by_class: dict[str, Any]
) -> dict[str, Any]:
    with importing_sae_bench():
        from sae_bench.evals.scr_and_tpp import eval_output as schema

    if config.perform_scr:
        details = [schema.ScrResultDetail(dataset_name=name, **values) for name, values in results.items()]
        metrics = schema.ScrMetricCategories(scr_metrics=schema.ScrMetrics(**overall))
        return suite.output(schema.ScrEvalOutput, config, sae, eval_result_metrics=metrics, eval_result_details=details)
    details = [schema.TppResultDetail(dataset_name=name, **values) for name, values in results.items()]
    metrics = schema.TppMetricCategories(tpp_metrics=schema.TppMetrics(**overall))
    return suite.output(
        schema.TppEvalOutput,
        config,
        sae,
        eval_result_metrics=metrics,
        eval_result_details=details,
        eval_result_unstructured=by_class,
    )


class _Silent:
    """An SAE whose latents never fire."""

    def __init__(self, d_sae: int, d_in: int, dtype: str, device: torch.device):
        self.W_dec = torch.nn.Parameter(
            torch.zeros(d_sae, d_in, dtype=getattr(torch, dtype), device=device), requires_grad=False
        )

    def encode(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """Zeros [B, L, F]."""
        return x_BLD.new_zeros(*x_BLD.shape[:-1], len(self.W_dec))

    def decode(self, f_BLF: torch.Tensor) -> torch.Tensor:
        """Zeros [B, L, D]."""
        return f_BLF.new_zeros(*f_BLF.shape[:-1], self.W_dec.shape[1])
