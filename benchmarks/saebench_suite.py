"""sae-bench's SCR, TPP and core of eleven SAEs: `dasae evaluate` against eleven runs of sae-bench, which share nothing.

    python benchmarks/saebench_suite.py --model FOLDER --data FOLDER --corpus FOLDER [--saes 11]

The model is a small Gemma-2 with its tokenizer. `--data` holds data sets in the Hub's layout, among them Amazon reviews of
the categories 6 and 31 and `fancyzhx/ag_news`; `--corpus` is a folder with parquet files that have a column `text`. Both
sides start from an evaluated study of SAEs that were trained for a few steps. Ours is one command. A run of the others is a
process that loads the model and one exported SAE, and calls sae-bench's `run_eval` for SCR and TPP and `multiple_evals` for
core, with artefacts of its own. Ours runs after the last of these, on a fresh copy of the study.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from measure import show

from pipeline.artefacts.workspace import Workspace
from pipeline.sae.formats import CONFIG, to_saelens
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent
LAYER, D_SAE, CONTEXT, ROUNDS = 3, 1536, 128, 1
REVIEWS, NEWS = "canrager/amazon_reviews_mcauley_1and5", "fancyzhx/ag_news"
SCR = {
    "dataset_names": [REVIEWS],
    "train_set_size": 140,
    "test_set_size": 40,
    "column1_vals_lookup": {REVIEWS: [["Electronics", "Health_and_Personal_Care"]]},
}
TPP = {"dataset_names": [NEWS], "train_set_size": 400, "test_set_size": 200}
CORE = {"batch_size_prompts": 16, "n_eval_reconstruction_batches": 5, "n_eval_sparsity_variance_batches": 5}

STUDY = """
description = "sae-bench's suite."
model = {{ source = "huggingface", name = "{model}", d_in = {d_in}, depth = {depth}, dtype = "float32" }}
corpus = {{ source = "python" }}
store = {{ layers = [{layer}], tokens = 40_000, context = {context}, shard_rows = 16384, chunk_rows = 1024 }}
probes = {{ datasets = ["python/text-kind"], train_size = 40, test_size = 20, context = 32 }}
train = {{ d_sae = {d_sae}, steps = 60, batch_size = 512, lr_warmup = 5, l1_warmup = 5, learning_rate = 1e-3 }}
study = {{ layers = [{layer}], seeds = {seeds}, arms = ["baseline"] }}
evaluate = {{ k_values = [1], loss_tokens = 0{asked} }}
"""


def study(args: argparse.Namespace, suite: bool) -> str:
    """The experiment file, with or without the suite."""
    config = json.loads((args.model / "config.json").read_text())
    text = STUDY.format(
        model=args.model, d_in=config["hidden_size"], depth=config["num_hidden_layers"], layer=LAYER, context=CONTEXT,
        d_sae=D_SAE, seeds=list(range(args.saes)), asked=', saebench = ["core", "scr", "tpp"]' if suite else "",
    )  # fmt: skip
    if suite:
        text += f'[saebench]\ndata = "{args.data}"\n'
        for name, settings in (("core", CORE | {"dataset": str(args.corpus)}), ("scr", SCR), ("tpp", TPP)):
            text += f"[saebench.{name}]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in settings.items())
    return text


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, dict):
        entries = cast("dict[str, Any]", value).items()
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(entry)}" for key, entry in entries) + "}"
    return json.dumps(value)


def command(*arguments: object) -> None:
    """`dasae` in a process of its own."""
    run = [sys.executable, "-c", "from pipeline.cli import main; main()", *map(str, arguments)]
    subprocess.run(run, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)


def stock(folder: Path, model: str, corpus: str) -> None:
    """In a process of its own: sae-bench on the exported SAE in `folder`, from the folder of the data sets."""
    from pipeline.runtime.compatibility import importing_sae_bench

    with importing_sae_bench():
        import sae_lens
        import torch
        import transformer_lens
        from sae_bench.evals.core import main as core
        from sae_bench.evals.scr_and_tpp import main as concepts
        from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig

        from pipeline.models.hooked import hooked_model

        def load(*_arguments: Any, **_options: Any) -> Any:
            return hooked_model(model, revision=None, dtype="float32", device=torch.device("cpu"))

        # It has no name that TransformerLens knows; every evaluation loads it, as every one of its commands does.
        cast("Any", transformer_lens.HookedTransformer).from_pretrained_no_processing = load
        cast("Any", concepts).COLUMN2_VALS_LOOKUP[NEWS] = None
        for scr, settings in ((True, SCR), (False, TPP)):
            config = ScrAndTppEvalConfig(
                model_name=Path(model).name, perform_scr=scr, llm_dtype="float32", llm_batch_size=32, **cast("Any", settings)
            )
            sae: Any = cast("Any", sae_lens.SAE).load_from_disk(str(folder), device="cpu")
            out, acts = str(folder / "out"), str(folder / "acts")
            concepts.run_eval(config, [("theirs", sae)], "cpu", out, artifacts_path=acts)
        sae = cast("Any", sae_lens.SAE).load_from_disk(str(folder), device="cpu")
        core.multiple_evals(
            [("theirs", sae)],
            n_eval_reconstruction_batches=CORE["n_eval_reconstruction_batches"],
            n_eval_sparsity_variance_batches=CORE["n_eval_sparsity_variance_batches"],
            eval_batch_size_prompts=CORE["batch_size_prompts"],
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            dataset=corpus,
            context_size=CONTEXT,
            output_folder=str(folder / "core"),
            device="cpu",
        )


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Both sides in turn."""
    file, workspace = folder / "suite.toml", folder / "workspace"
    file.write_text(study(args, suite=False))
    command("ablate", file, "--workspace", workspace)
    file.write_text(study(args, suite=True))
    plan = make_plan(Experiment.load(str(file)))
    theirs: list[float] = []
    ours: list[float] = []
    equal = found = 0
    for number, sae in enumerate(plan.saes):
        exported = folder / f"sae-{number}"
        to_saelens(Workspace(workspace).fetched(sae.artefact), exported, sae.artefact.name)
        config = json.loads((exported / CONFIG).read_text())
        config["metadata"] |= {"hook_name": f"blocks.{LAYER}.hook_resid_post", "context_size": CONTEXT, "prepend_bos": True}
        (exported / CONFIG).write_text(json.dumps(config))
        started = time.perf_counter()
        run = [sys.executable, __file__, "--stock", exported, "--model", args.model, "--corpus", args.corpus]
        environment, no = os.environ | {"PYTHONPATH": str(ROOT)}, subprocess.DEVNULL
        subprocess.run([*map(str, run)], check=True, cwd=args.data, env=environment, stdout=no, stderr=no)
        theirs.append(time.perf_counter() - started)
        if len(ours) < (number + 1) * ROUNDS // args.saes:
            copy = folder / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(workspace, copy)
            started = time.perf_counter()
            command("evaluate", file, "--workspace", copy)
            ours.append(time.perf_counter() - started)
            print(f"ours {ours[-1]:.0f} s, one of sae-bench {theirs[-1]:.0f} s", file=sys.stderr)
    for number, sae in enumerate(plan.saes):
        for name in ("core", "scr"):
            mine = json.loads((Workspace(folder / "copy").folder(sae.apart[name]) / f"{name}.json").read_text())
            (written,) = (folder / f"sae-{number}").glob("core/*.json" if name == "core" else "out/scr/*.json")
            other = json.loads(written.read_text())
            equal += mine["eval_result_metrics"] == other["eval_result_metrics"]
            found += 1
    took = sorted(ours)[len(ours) // 2]
    show(
        f"SCR, TPP and core of {args.saes} SAEs of {D_SAE} latents",
        ["", "seconds", "x faster", "at least"],
        [
            [f"{args.saes} runs of sae-bench", f"{sum(theirs):.0f}", "", ""],
            [f"one `dasae evaluate`, median of {len(ours)}", f"{took:.0f}", f"{sum(theirs) / took:.2f}", "2"],
        ],
    )
    print(f"\n{equal} of {found} results of core and SCR are equal; TPP follows sae-bench's second run, not its first")


def main() -> None:
    """Read the arguments and compare in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--corpus", required=True, type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--saes", type=int, default=11)
    parser.add_argument("--stock", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("model", "corpus", "data"):
        if getattr(args, name):
            setattr(args, name, getattr(args, name).resolve())
    if args.stock:
        stock(args.stock, str(args.model), str(args.corpus))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


if __name__ == "__main__":
    main()
