"""The whole job, from an empty workspace to the report, against as many runs of SAELens and sae-bench, in turn.

    python benchmarks/whole_job.py --model FOLDER --data FOLDER --corpus FILE.parquet [--saes 11] [--tokens 491520]

The model is a small Gemma-2 with its tokenizer, `--data` a folder in which sae-bench's `load_dataset` finds the data set,
the corpus a parquet file with a column `text`. Ours are three studies of eleven arms each: the contrast on every step, the
contrast on every fifth, and vanilla SAEs. Each is one command in a process of its own, so that imports, tokenizing, locks,
checksums and the report count. The others are eleven live runs of SAELens (one vanilla SAE each, its activations made while
it trains) and eleven of sae-bench's sparse probing (the first makes the activations, the others find them), in this process
with everything imported and the model loaded. The runs of both sides take turns.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from evaluation import Stock, random_sae
from measure import show

from pipeline.runtime.compatibility import importing_sae_bench

CONTEXT, BATCH, D_SAE, LAYER = 128, 2048, 1536, 3
RATE, L1, WARMUP = 3e-4, 0.04, 50
CONTRAST = (
    "baseline", "full", "magnitude", "no-contrast", "unweighted", "coef-0.05", "coef-0.2", "topk-0.05", "topk-0.2", "row",
    "mutual",
)  # fmt: skip
STUDIES = {"contrast on every step": 1, "contrast on every fifth step": 5, "vanilla": 0}
"""Name to `contrast.every`; 0 for a study without the contrast."""
AT_LEAST = {"contrast on every step": "2", "contrast on every fifth step": "4", "vanilla": "4.5"}

ROOT = Path(__file__).resolve().parent.parent

STUDY = """
description = "The whole job."
[model]
source = "huggingface"
name = "{model}"
d_in = {d_in}
depth = {depth}
dtype = "float32"
[corpus]
source = "files"
paths = ["{corpus}"]
[store]
layers = [{layer}]
tokens = {tokens}
context = {context}
[probes]
datasets = ["{dataset}"]
train_size = {train}
test_size = {test}
context = {context}
[train]
precision = "{precision}"
d_sae = {d_sae}
steps = {steps}
batch_size = {batch}
learning_rate = {rate}
lr_warmup = {warmup}
l1 = {l1}
l1_warmup = {warmup}
heldout_shards = 1
[train.resets]
every = 50
first = 100
[train.contrast]
pair_refresh = 10
precision = "{precision}"
every = {every}
"""


def study(args: argparse.Namespace, every: int) -> str:
    """The experiment file of a study of `args.saes` arms."""
    config = json.loads((args.model / "config.json").read_text())
    arms = CONTRAST[: args.saes] if every else [f"vanilla-{number}" for number in range(args.saes)]
    text = STUDY.format(
        **vars(args), d_in=config["hidden_size"], depth=config["num_hidden_layers"], layer=LAYER, context=CONTEXT,
        d_sae=D_SAE, steps=args.tokens // BATCH, batch=BATCH, rate=RATE, warmup=WARMUP, l1=L1, every=every or 1,
    )  # fmt: skip
    for number, arm in enumerate(() if every else arms):
        text += f'[arms.{arm}]\nquestion = "."\nfrom = "baseline"\nl1 = {L1 * (1 + number)}\n'
    return text + f"[study]\nlayers = [{LAYER}]\nseeds = [0]\narms = {json.dumps(list(arms))}\n"


def ours(args: argparse.Namespace, name: str, folder: Path) -> float:
    """Seconds of a study, from an empty workspace to its report."""
    file, workspace = folder / f"{name.replace(' ', '-')}.toml", folder / "workspace"
    file.write_text(study(args, STUDIES[name]))
    # The data set is found in the current folder, as sae-bench finds it.
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "ablate", file, "--workspace", workspace]
    started = time.perf_counter()
    subprocess.run(command, check=True, cwd=args.data, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=sys.stderr)
    seconds = time.perf_counter() - started
    shutil.rmtree(workspace)
    return seconds


def contexts(args: argparse.Namespace) -> Any:
    """The corpus as SAELens takes it, tokenized beforehand: contexts that begin with BOS."""
    import datasets
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(args.model)
    rows: list[list[int]] = []
    pending: list[int] = []
    for batch in pq.ParquetFile(args.corpus).iter_batches(256, columns=["text"]):
        for ids in tokenizer(batch["text"].to_pylist(), add_special_tokens=False)["input_ids"]:
            pending += [tokenizer.bos_token_id, *ids]
        while len(pending) >= CONTEXT - 1:
            rows.append([tokenizer.bos_token_id, *pending[: CONTEXT - 1]])
            pending = pending[CONTEXT - 1 :]
        if len(rows) > 1.1 * args.tokens / CONTEXT:
            break
    return datasets.Dataset.from_dict({"input_ids": np.array(rows, dtype=np.int32)})


def saelens(args: argparse.Namespace, model: Any, texts: Any, number: int, folder: Path) -> float:
    """Seconds of a live run of SAELens that trains one vanilla SAE."""
    with importing_sae_bench():
        from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, StandardTrainingSAEConfig
        from sae_lens import LanguageModelSAETrainingRunner as Runner
    sae = StandardTrainingSAEConfig(d_in=model.cfg.d_model, d_sae=D_SAE, l1_coefficient=L1 * (1 + number))
    config: Any = LanguageModelSAERunnerConfig(
        sae=sae, model_name="local", dataset_path="local", hook_name=f"blocks.{LAYER}.hook_resid_post", streaming=False,
        context_size=CONTEXT, training_tokens=args.tokens, store_batch_size_prompts=32, train_batch_size_tokens=BATCH,
        lr=RATE, lr_warm_up_steps=WARMUP, device="cpu", checkpoint_path=None, output_path=str(folder / "saelens"),
        verbose=False, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    started = time.perf_counter()
    with quiet():
        Runner(config, override_dataset=texts, override_model=model).run()
    return time.perf_counter() - started


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without the bars and remarks of others."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Everything in turn."""
    texts = contexts(args)
    stock = Stock(args, folder / "artifacts")
    trained: list[float] = []
    probed: list[float] = []
    seconds: dict[str, float] = {}
    waiting = list(STUDIES)
    for number in range(args.saes):
        trained.append(saelens(args, stock.model, texts, number, folder))
        started = time.perf_counter()
        stock(random_sae(number, stock.model.cfg.d_model, D_SAE))
        probed.append(time.perf_counter() - started)
        if waiting and number >= (len(STUDIES) - len(waiting)) * args.saes / len(STUDIES):
            name = waiting.pop(0)
            seconds[name] = ours(args, name, folder)
            print(f"{name}: {seconds[name]:.0f} s; SAELens {trained[-1]:.0f}, sae-bench {probed[-1]:.0f}", file=sys.stderr)
    theirs = sum(trained) + sum(probed)
    show(
        f"{args.saes} SAEs of {D_SAE} latents, {args.tokens:,} tokens, {args.dataset} {args.train} / {args.test}, "
        f"ours in {args.precision}",
        ["", "seconds", "x faster", "at least"],
        [
            [f"{args.saes} live runs of SAELens", f"{sum(trained):.0f}", "", ""],
            [f"{args.saes} runs of sae-bench", f"{sum(probed):.0f}", "", ""],
            *([f"ours, {name}", f"{took:.0f}", f"{theirs / took:.2f}", AT_LEAST[name]] for name, took in seconds.items()),
        ],
    )


def main() -> None:
    """Read the arguments and compare in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--corpus", required=True, type=Path)
    parser.add_argument("--dataset", default="fancyzhx/ag_news")
    parser.add_argument("--saes", type=int, default=11)
    parser.add_argument("--tokens", type=int, default=491_520)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of our products")
    args = parser.parse_args()
    args.model, args.corpus = args.model.resolve(), args.corpus.resolve()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HF_DATASETS_CACHE"] = str(Path(temporary) / "datasets")
        compare(args, Path(temporary))


if __name__ == "__main__":
    main()
