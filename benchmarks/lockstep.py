"""Eleven SAEs from one set of activations: ours in lockstep, against SAELens and dictionary_learning.

    python benchmarks/lockstep.py --model FOLDER --corpus FILE.parquet [--tokens 98304] [--saes 11]

A store and a SAELens cache of the same text are made first and not counted. Every contestant then trains in a process of its
own, in turn, all cores, the same number of SAEs, steps and rows; imports and loading the language model are not counted.
SAELens' single runs are measured once and multiplied.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from extraction import CONTEXT, LAYER, extract, hooked, texts_of
from measure import peak_memory, reset_peak_memory, show

from pipeline.models.language import ResidualStream
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.sae.formats import write_sae
from pipeline.store.batches import shuffled_batches
from pipeline.store.reader import ActivationStore
from pipeline.study.arms import ARMS, Recipes
from pipeline.study.recipe import TrainConfig
from pipeline.texts import packing
from pipeline.train.cohort import Member, train_cohort
from pipeline.train.step import Trainer

BATCH = 2048
TABLE = [name for name, arm in ARMS.items() if arm.run is not None]


def ours(args: argparse.Namespace, *, precision: str, arms: list[str], alone: bool = False) -> float:
    """Our cohort, or each SAE of it alone. Returns the median of the last batch's FVU."""
    store = ActivationStore(next((args.folder / "ours").glob("*/stores/*")))
    steps = args.tokens // BATCH
    full = TrainConfig.model_validate(
        {"d_sae": args.d_sae, "steps": steps, "batch_size": BATCH, "precision": precision, "lr_warmup": 5, "l1_warmup": 5}
        | {"contrast": {"precision": precision, "pair_refresh": 10}, "resets": {"every": 500, "first": 1000}}
    )
    recipes = Recipes(full)
    trainers = [
        Trainer(config=recipes[arm], d_in=store.layout.d_in, seed=seed)
        for seed, arm in zip(range(args.saes), cycle(arms), strict=False)
    ]
    fvu: list[float] = []
    for cohort in [[trainer] for trainer in trainers] if alone else [trainers]:
        batches = shuffled_batches(store, LAYER, store.shards, batch_size=BATCH, buffer_chunks=32, seed=0)
        members = [Member(trainer=trainer, log=io.StringIO()) for trainer in cohort]
        train_cohort(members, batches, steps, "ours")
        fvu += [member.last["fvu"] for member in members]
    for number, trainer in enumerate(trainers):
        (args.folder / f"ours-{number}").mkdir(exist_ok=True)
        write_sae(trainer.finished(store.scale(LAYER)), args.folder / f"ours-{number}", {})
    return statistics.median(fvu)


def saelens(args: argparse.Namespace, *, multi: bool) -> None:
    """SAELens' runner from its cache, once; or its runner of several SAEs, which has no cache, on the language model."""
    from datasets import Dataset
    from sae_lens import LoggingConfig, StandardTrainingSAEConfig

    text = Dataset(pq.read_table(args.corpus, columns=["text"]))
    shared: dict[str, Any] = {
        "model_name": "local", "dataset_path": "local", "streaming": False, "context_size": CONTEXT, "device": "cpu",
        "training_tokens": args.tokens, "store_batch_size_prompts": 32, "train_batch_size_tokens": BATCH, "lr": 3e-4,
        "lr_warm_up_steps": 5, "n_batches_in_buffer": 20, "checkpoint_path": None,
        "output_path": str(args.folder / "saelens"), "logger": LoggingConfig(log_to_wandb=False),
    }  # fmt: skip
    d_in, hook = args.hooked.cfg.d_model, f"blocks.{LAYER}.hook_resid_post"

    def sae(number: int = 0) -> Any:
        return StandardTrainingSAEConfig(d_in=d_in, d_sae=args.d_sae, l1_coefficient=0.04 * (1 + number))

    if multi:
        from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig

        config = MultiSAETrainingRunnerConfig(
            saes={f"sae{number}": sae(number) for number in range(args.saes)}, hook_names=hook, **shared
        )
        MultiSAETrainingRunner(config, override_dataset=text, override_model=args.hooked).run()
        return
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner

    cached = {"use_cached_activations": True, "cached_activations_path": str(args.folder / "cache")}
    config = LanguageModelSAERunnerConfig(sae=sae(), hook_name=hook, verbose=False, **cached, **shared)
    LanguageModelSAETrainingRunner(config, override_dataset=text, override_model=args.hooked).run()


def dictionary_learning(args: argparse.Namespace) -> None:
    """dictionary_learning's `trainSAE` on float32 batches that are in memory already: the cheapest it can do."""
    sys.modules.setdefault("nnsight", type(sys)("nnsight")).__dict__.setdefault("LanguageModel", object)
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.training import trainSAE

    steps = args.tokens // BATCH
    configs = [
        {
            "trainer": StandardTrainer, "steps": steps, "activation_dim": args.batches[0].shape[1], "dict_size": args.d_sae,
            "layer": LAYER, "lm_name": "local", "lr": 3e-4, "l1_penalty": 0.04 * (1 + number), "warmup_steps": 5,
            "sparsity_warmup_steps": 5, "resample_steps": None, "seed": number, "device": "cpu",
        }
        for number in range(args.saes)
    ]  # fmt: skip
    trainSAE(
        data=iter(args.batches),
        trainer_configs=configs,
        steps=steps,
        device="cpu",
        save_dir=str(args.folder / "dictionaries"),
    )


CONTESTANTS = {
    "ours, float32": partial(ours, precision="float32", arms=["baseline"]),
    "ours, bfloat16": partial(ours, precision="bfloat16", arms=["baseline"]),
    "ours, float32, one after the other": partial(ours, precision="float32", arms=["baseline"], alone=True),
    "ours, bfloat16, the arms": partial(ours, precision="bfloat16", arms=TABLE),
    "SAELens from its cache": partial(saelens, multi=False),
    "SAELens, several SAEs, live": partial(saelens, multi=True),
    "dictionary_learning, from memory": dictionary_learning,
}


def prepare(args: argparse.Namespace) -> None:
    """The store and SAELens' cache of the same text."""
    model = ResidualStream(args.model, layers=(LAYER,), dtype="float32")
    pack = partial(packing.pack, tokenizer=model.tokenizer, context=CONTEXT, rows=args.tokens + 32768)
    (args.folder / "ours").mkdir()
    extract(model, lambda: pack(texts_of(args.corpus)), args.tokens, 32, "bfloat16", args.folder / "ours")
    with importing_sae_bench():
        import sae_lens.cache_activations_runner as runner
        from datasets import Dataset
    hook_model = hooked(args.model)
    runner.load_model = lambda *_, **__: hook_model
    tokens = (args.tokens // (32 * CONTEXT) + 25) * 32 * CONTEXT  # its buffer is filled before the first step
    config = runner.CacheActivationsRunnerConfig(
        dataset_path="local", model_name="local", model_batch_size=32, hook_name=f"blocks.{LAYER}.hook_resid_post",
        d_in=model.d_in, training_tokens=tokens, context_size=CONTEXT, device="cpu", dtype="float32", streaming=False,
        new_cached_activations_path=str(args.folder / "cache"), buffer_size_gb=(tokens * model.d_in * 4 + 1) / 1e9,
    )  # fmt: skip
    text = Dataset(pq.read_table(args.corpus, columns=["text"]))
    runner.CacheActivationsRunner(config, override_dataset=text).run()


def one(args: argparse.Namespace) -> None:
    """Run one contestant and print what it took."""
    with importing_sae_bench():
        import_module("sae_lens")  # imported before the clock starts
    if args.contestant.startswith("SAELens"):
        args.hooked = hooked(args.model)
    if args.contestant.startswith("dictionary"):
        store = ActivationStore(next((args.folder / "ours").glob("*/stores/*")))
        stream = shuffled_batches(store, LAYER, store.shards, batch_size=BATCH, buffer_chunks=32, seed=0)
        args.batches = [next(stream) for _ in range(args.tokens // BATCH + 1)]
    torch.manual_seed(0)
    reset_peak_memory()
    began = time.perf_counter()
    fvu = CONTESTANTS[args.contestant](args)
    print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak_memory(), "fvu": fvu}))


def main() -> None:
    """Run all, or the one that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--tokens", type=int, default=98_304)
    parser.add_argument("--saes", type=int, default=11)
    parser.add_argument("--d-sae", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--contestant", choices=CONTESTANTS)
    args = parser.parse_args()
    if args.contestant:
        one(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        prepare(args)
        command = [sys.executable, __file__, "--model", args.model, "--corpus", args.corpus, "--tokens", str(args.tokens)]
        command += ["--saes", str(args.saes), "--d-sae", str(args.d_sae), "--folder", folder]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
        for _ in range(args.rounds):
            for name, of in runs.items():
                output = subprocess.run([*command, "--contestant", name], check=True, stdout=subprocess.PIPE)
                of.append(json.loads(output.stdout.splitlines()[-1]))
    seconds = {name: statistics.median(run["seconds"] for run in of) for name, of in runs.items()}
    seconds["SAELens from its cache"] *= args.saes
    peers = [name for name in seconds if not name.startswith("ours")]
    show(
        f"{args.saes} SAEs of {args.d_sae} latents on {args.tokens:,} rows, batches of {BATCH}, {Path(args.model).name}",
        ["", "seconds", *(f"x {name}" for name in peers), "peak MB", "FVU"],
        [
            [
                name,
                f"{value:.1f}",
                *(f"{seconds[peer] / value:.2f}" for peer in peers),
                f"{runs[name][0]['peak'] / 1e6:.0f}",
                str(runs[name][0]["fvu"] or "")[:6],
            ]
            for name, value in seconds.items()
        ],
    )


if __name__ == "__main__":
    main()
