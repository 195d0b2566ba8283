"""Sparse probing of several SAEs on the same texts: ours against as many runs of sae-bench that find its cached activations.

    python benchmarks/evaluation.py --model FOLDER --data FOLDER [--dataset fancyzhx/ag_news] [--saes 11] [--d-sae 1536]

The model is a small Gemma-2 with its tokenizer, `--data` a folder in which sae-bench's `load_dataset` finds the data set.
Its first run, which computes the activations and probes the model itself, is counted for nobody; our store is given the very
activations that it cached, so that every number must be equal, and the benchmark fails when one is not. Random SAEs.
"""

import argparse
import contextlib
import io
import os
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from extraction import hooked
from measure import peak_memory, reset_peak_memory, show

from pipeline.compatibility import importing_sae_bench
from pipeline.evaluate import probing
from pipeline.sae import SAE
from pipeline.storage import LocalStorage
from pipeline.store import format as fmt
from pipeline.store.documents import SPLITS, Documents
from pipeline.store.reader import ActivationStore
from pipeline.store.writer import ShardWriter

LAYER = 3
K_VALUES = [1, 2, 5, 10, 20, 50]


def random_sae(seed: int, d_in: int, d_sae: int) -> SAE:
    """A tied SAE of random directions, with a bias that leaves about a tenth of its latents firing."""
    generator = torch.Generator().manual_seed(seed)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    bias_F = torch.full((d_sae,), -1.0)
    return SAE(W_enc_DF=W_dec_FD.T.contiguous(), b_enc_F=bias_F, W_dec_FD=W_dec_FD, b_dec_D=torch.zeros(d_in))


class Stock:
    """sae-bench's runner in a folder of its own, with one model and one configuration."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        with importing_sae_bench():
            from sae_bench.evals.sparse_probing import main
            from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
        self.run_eval_single_sae, self.folder = main.run_eval_single_sae, folder
        self.model = hooked(args.model)
        self.model.tokenizer.padding_side = "right"
        self.config = SparseProbingEvalConfig(
            model_name="small", dataset_names=[args.dataset], probe_train_set_size=args.train, probe_test_set_size=args.test,
            llm_batch_size=32, llm_dtype="float32", k_values=K_VALUES,
        )  # fmt: skip
        os.chdir(args.data)

    def __call__(self, sae: SAE) -> dict[str, Any]:
        """Per-class results of one SAE."""
        cfg = SimpleNamespace(hook_layer=LAYER, hook_name=f"blocks.{LAYER}.hook_resid_post")
        wrapped: Any = SimpleNamespace(cfg=cfg, dtype=torch.float32, encode=sae.encode)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            return self.run_eval_single_sae(self.config, wrapped, self.model, "cpu", str(self.folder))[1]


def as_store(cached: Path, folder: Path) -> Documents:
    """The activations that sae-bench cached, as a probe store: rows are the tokens it did not mask."""
    activations = torch.load(cached, weights_only=True)
    documents = [
        (x_LD[x_LD.any(dim=1)], label, split)
        for split, name in enumerate(SPLITS)
        for label, x_NLD in enumerate(activations[name].values())
        for x_LD in x_NLD
    ]
    context, d_in = next(iter(activations["train"].values())).shape[1:]
    rows_RD = torch.cat([x_RD for x_RD, _, _ in documents])
    layout = fmt.Layout(
        rows=len(rows_RD), shard_rows=32768, chunk_rows=1024, layers=(LAYER,), d_in=d_in, dtype="float32", codec="raw",
        row_order="document", seed=0, special_ids=(0, 1, 2), provenance={}, classes=tuple(activations["train"]),
    )  # fmt: skip
    sequences = fmt.Sequences(
        tokens_SL=np.zeros((len(documents), context), dtype=np.int32),
        row_offsets=np.cumsum([0, *(len(x_RD) for x_RD, _, _ in documents)]),
        doc_starts=np.arange(len(documents), dtype=np.int64) * context,
    )
    labels = {
        "label": np.array([label for _, label, _ in documents], dtype=np.int32),
        "split": np.array([split for _, _, split in documents], dtype=np.uint8),
    }
    folder.mkdir()
    fmt.create(LocalStorage(folder), fmt.NewStore(layout=layout, sequences=sequences, labels=labels))
    writer = ShardWriter(LocalStorage(folder))
    for shard in range(layout.shards):
        start, stop = layout.shard_range(shard)
        nowhere = dict.fromkeys(fmt.ROW_FIELDS, np.zeros(stop - start, dtype=np.int32))
        writer.write(shard, {LAYER: rows_RD[start:stop]}, nowhere)
    return Documents(ActivationStore(folder), LAYER)


def ours(documents: Documents, dataset: str, sae: SAE) -> dict[str, Any]:
    """Per-class results of one SAE, named as sae-bench names them."""
    with torch.no_grad():
        train, test = (probing.pool(documents.padded(split, probing.POOLING_BATCH), sae.encode) for split in SPLITS)
        result = probing.probe([(dataset, train, test)], K_VALUES, seed=42)[dataset]
    return {f"sae_{'' if k == 'all' else f'top_{k}_'}test_accuracy": by_class for k, by_class in result.items()}


def main() -> None:
    """Every SAE by sae-bench and by us in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--dataset", default="fancyzhx/ag_news")
    parser.add_argument("--saes", type=int, default=11)
    parser.add_argument("--d-sae", type=int, default=1536)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=500)
    args = parser.parse_args()
    args.model = args.model.resolve()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
        stock = Stock(args, folder / "artifacts")
        d_in = stock.model.cfg.d_model
        stock(random_sae(0, d_in, args.d_sae))
        documents = as_store(folder / "artifacts" / f"{args.dataset.replace('/', '_')}_activations.pt", folder / "store")
        seconds = {"sae-bench, cached": 0.0, "ours": 0.0}
        processor = dict.fromkeys(seconds, 0.0)
        peak = dict.fromkeys(seconds, 0)
        compared = 0
        for number in range(args.saes):
            sae, results = random_sae(number, d_in, args.d_sae), {}
            for name, run in (
                ("sae-bench, cached", lambda sae: stock(sae)[f"{args.dataset}_results"]),
                ("ours", lambda sae: ours(documents, args.dataset, sae)),
            ):
                reset_peak_memory()
                clock, cpu = time.perf_counter(), time.process_time()
                results[name] = run(sae)
                seconds[name] += time.perf_counter() - clock
                processor[name] += time.process_time() - cpu
                peak[name] = max(peak[name], peak_memory())
            for metric, by_class in results["ours"].items():
                assert by_class == results["sae-bench, cached"][metric], f"SAE {number}, {metric}: the numbers differ"
                compared += len(by_class)
        ratio = {name: seconds["sae-bench, cached"] / value for name, value in seconds.items()}
        show(
            f"{args.saes} SAEs, {args.dataset} {args.train} / {args.test}, d_in {d_in}, d_sae {args.d_sae}: "
            f"{compared} numbers, all equal",
            ["", "seconds", "x faster", "at least", "CPU seconds", "peak MB"],
            [
                [
                    name, f"{value:.1f}", f"{ratio[name]:.2f}", "3" if name == "ours" else "", f"{processor[name]:.1f}",
                    f"{peak[name] / 1e6:.0f}",
                ]
                for name, value in seconds.items()
            ],
        )  # fmt: skip


if __name__ == "__main__":
    main()
