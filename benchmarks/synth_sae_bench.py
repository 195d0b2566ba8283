"""Our Standard and BatchTopK SAEs beside SAELens' own, trained on the same rows in the same order, judged by SAELens.

    dasae ablate synth-sae-bench-small --workspace WORKSPACE
    python benchmarks/synth_sae_bench.py synth-sae-bench-small --workspace WORKSPACE [--sparsities 8] [--seeds 0 1 2]

Ours are taken from the finished study. SAELens' `StandardTrainingSAE` and `BatchTopKTrainingSAE` are trained by its
`SAETrainer` with the recipe of the arm, twice: on the rows as ours are trained on them, scaled to a mean square norm of 1,
and on the rows as they are, which is how the published table was made. Their initial weights, their clipped gradients and
their term for dead latents are SAELens'. Its Standard SAE has no way to a given L0, so its coefficient is steered as ours
is. Everybody is judged as a finished SAE, which for BatchTopK means with a threshold, by `eval_sae_on_synthetic_data` on the
same held-out rows. In brackets: how far ours are from SAELens' mean, in standard deviations of SAELens' seeds.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from statistics import mean, stdev
from typing import Any

import torch
from measure import show

from pipeline.artefacts.workspace import Workspace
from pipeline.evaluate.synth_sae_bench import AsSAELens, saelens_metrics
from pipeline.models.saelens_model import SAELensTruth
from pipeline.runtime.compatibility import importing_sae_bench, quiet_sae_bench
from pipeline.sae.finished import open_sae
from pipeline.store.batches import shuffled_batches, split_shards
from pipeline.store.reader import ActivationStore
from pipeline.study.experiment import Experiment
from pipeline.study.plan import Plan, make_plan
from pipeline.study.planned import TrainedSAE
from pipeline.study.recipe import TrainConfig
from pipeline.study.study_model import open_synthetic_model
from pipeline.train.steering import Steering

ARCHITECTURES = {"relu": "Standard", "batchtopk": "BatchTopK"}
"""SAELens' names of activations."""
METRICS = ("L0", "F1", "MCC", "uniqueness", "EV", "dead")
JUDGED = ("F1", "MCC", "uniqueness", "EV")

Numbers = dict[str, float]


class Study:
    """The store of a study, its true features on the held-out rows, and what SAELens says of an SAE on them."""

    def __init__(self, plan: Plan, workspace: Workspace):
        self.plan, self.layer = plan, plan.experiment.study.layers[0]
        self.store = ActivationStore(workspace.storage(plan.store))
        self.scale = self.store.scale(self.layer)
        truth = open_synthetic_model(plan, workspace)
        assert isinstance(truth, SAELensTruth), "the model of the study is none that SAELens built"
        self.truth = truth
        self.shards, heldout = split_shards(self.store, plan.experiment.train.heldout_shards)
        self.true = [f_BT.to_sparse() for shard in heldout for f_BT, _ in truth.draw(self.store.layout, shard)]

    def judged(self, sae: Any) -> Numbers:
        """The metrics of an SAE that reads the rows as they are."""
        rows = sum(map(len, self.true))
        chunks = (f_BT.to_dense() for f_BT in self.true)
        found = saelens_metrics(sae, self.truth, chunks, rows=rows, chunk_rows=self.store.layout.chunk_rows)
        f1 = found.classification.f1_score
        values = (found.sae_l0, f1, found.mcc, found.uniqueness, found.explained_variance, found.dead_latents)
        return dict(zip(METRICS, values, strict=True))

    def batches(self, recipe: TrainConfig, scale: float) -> Generator[torch.Tensor]:
        """The batches that ours were trained on, times `scale` over their own."""
        stream = shuffled_batches(
            self.store,
            self.layer,
            self.shards,
            batch_size=recipe.batch_size,
            buffer_chunks=recipe.buffer_chunks,
            seed=recipe.data_seed,
        )
        with closing(stream) as batches:
            yield from (x_BD * (scale / self.scale) for x_BD in batches)


def trained_by_saelens(recipe: TrainConfig, study: Study, seed: int, scale: float) -> Any:
    """A finished SAE of SAELens, trained on rows times `scale`, that reads the rows as they are."""
    with importing_sae_bench():
        import sae_lens
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

    sizes: dict[str, Any] = {"d_in": study.truth.model.cfg.hidden_dim, "d_sae": recipe.d_sae}
    l1 = recipe.l1 * scale / study.scale  # the loss grows with the square of the scale, the sum of latents with the scale
    torch.manual_seed(seed)
    if recipe.k is None:
        config = sae_lens.StandardTrainingSAEConfig(**sizes, l1_coefficient=l1, l1_warm_up_steps=recipe.l1_warmup)
        sae: Any = sae_lens.StandardTrainingSAE(config)
    else:
        sae = sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**sizes, k=recipe.k))
    settings = SAETrainerConfig(
        total_training_samples=recipe.steps * recipe.batch_size,
        train_batch_size_samples=recipe.batch_size,
        lr=recipe.learning_rate,
        lr_end=recipe.learning_rate,
        lr_warm_up_steps=recipe.lr_warmup,
        lr_decay_steps=int(recipe.lr_decay * recipe.steps),
        dead_feature_window=recipe.auxk.dead_after // recipe.batch_size if recipe.auxk else recipe.steps,
    )
    steering = Steering(recipe.steered_to, torch.device("cpu")) if recipe.steered_to else None

    class Steered(SAETrainer[Any, Any]):
        def step(self, batch: torch.Tensor) -> Any:
            taken = super().step(batch)
            if steering:
                steering.observe((taken.feature_acts > 0).sum() / len(batch), self.n_training_steps + 1)
                self.coefficient_schedulers["l1"].final_value = l1 * steering.factor
            return taken

    with closing(study.batches(recipe, scale)) as batches, quiet_sae_bench():
        Steered(cfg=settings, sae=sae, data_provider=batches).fit()
    sae.fold_activation_norm_scaling_factor(scale)
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return sae_lens.SAE.load_from_disk(folder)


def compared(study: Study, saes: Sequence[TrainedSAE], workspace: Workspace) -> list[tuple[str, list[Numbers]]]:
    """What SAELens says of ours and of its own, seed by seed; all of one arm and L0."""
    contestants: dict[str, Callable[[TrainedSAE], Any]] = {
        "ours": lambda sae: AsSAELens(open_sae(sae.artefact, workspace)),
        "SAELens": lambda sae: trained_by_saelens(sae.recipe, study, sae.seed, study.scale),
        "SAELens, raw rows": lambda sae: trained_by_saelens(sae.recipe, study, sae.seed, 1.0),
    }
    return [(name, [study.judged(make(sae)) for sae in saes]) for name, make in contestants.items()]


def lines(title: str, found: list[tuple[str, list[Numbers]]]) -> list[list[str]]:
    """Rows of the table, one for each contestant; after each of SAELens, how far ours are from it."""
    (_, ours), *theirs = found
    table = [[f"{title}, ours", *(spread(ours, name) for name in METRICS)]]
    for contestant, numbers in theirs:
        table.append([f"{title}, {contestant}", *(spread(numbers, name) for name in METRICS)])
        table.append(["", *(f"({distance(ours, numbers, name):+.1f})" if name in JUDGED else "" for name in METRICS)])
    return table


def spread(numbers: list[Numbers], name: str) -> str:
    """Mean and standard deviation."""
    digits = 1 if name in ("L0", "dead") else 4
    values = [each[name] for each in numbers]
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def distance(ours: list[Numbers], theirs: list[Numbers], name: str) -> float:
    """Our mean minus theirs, in standard deviations of their seeds; NaN if these are all alike."""
    mine, others = [each[name] for each in ours], [each[name] for each in theirs]
    return (mean(mine) - mean(others)) / (stdev(others) or math.nan)


def main() -> None:
    """Train, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("--workspace", default="workspace")
    parser.add_argument("--arms", nargs="+", default=["no-contrast", "bt-plain"], help="on ReLU and on BatchTopK")
    parser.add_argument("--sparsities", nargs="+", type=float, help="those of the study by default")
    parser.add_argument("--seeds", nargs="+", type=int, help="at least two; those of the study by default")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    experiment, workspace = Experiment.load(arguments.experiment), Workspace(arguments.workspace)
    plan = make_plan(experiment, arms=arguments.arms, seeds=arguments.seeds)
    study = Study(plan, workspace)
    rows: list[list[str]] = []
    for arm in arguments.arms:
        for level in arguments.sparsities or experiment.study.sparsities:
            saes = [sae for sae in plan.to_train if (sae.arm, sae.sparsity) == (arm, level)]
            title = f"{ARCHITECTURES[saes[0].recipe.activation]} {level:g}"
            rows += lines(title, compared(study, saes, workspace))
            print("\n".join(" | ".join(row) for row in rows[-5:]), flush=True)
    show(f"{experiment.name}, {len(plan.to_train)} of ours", ["mean ± sd over seeds", *METRICS], rows)


if __name__ == "__main__":
    main()
