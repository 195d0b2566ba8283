"""Sparse probing of several SAEs on the same texts: ours against as many runs of sae-bench that find its cached activations.

    python benchmarks/evaluation.py --model FOLDER --data FOLDER [--dataset fancyzhx/ag_news] [--saes 11] [--d-sae 1536]

The model is a small Gemma-2 with its tokenizer, `--data` a folder in which sae-bench's `load_dataset` finds the data set.
Its first run, which computes the activations and probes the model itself, is counted for nobody; our store is given the very
activations that it cached, so that every number must be equal, and the benchmark fails when one is not. Random SAEs.

We probe as many SAEs at once as the evaluation stage does, and after each such group sae-bench takes its turn with the same
ones. Both run in one process, so that sae-bench has our OpenMP and OpenBLAS settings too, which help it on a busy machine.
At the end we probe two SAEs and then all of them again, which shows whether memory grows with their number.
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

from pipeline.artefacts.storage import LocalStorage
from pipeline.evaluate import probing
from pipeline.evaluate.tasks import ProbeTasks, Probing
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.sae.sae import SAE
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
        for label, x_SLD in enumerate(activations[name].values())
        for x_LD in x_SLD
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
    labels = fmt.Labels(
        label=np.array([label for _, label, _ in documents], dtype=np.int32),
        split=np.array([split for _, _, split in documents], dtype=np.uint8),
    )
    folder.mkdir()
    fmt.create(LocalStorage(folder), fmt.NewStore(layout=layout, sequences=sequences, labels=labels))
    writer = ShardWriter(LocalStorage(folder))
    for shard in range(layout.shards):
        start, stop = layout.shard_range(shard)
        nowhere = fmt.RowFields(**dict.fromkeys(fmt.ROW_FIELDS, np.zeros(stop - start, dtype=np.int32)))
        writer.write(shard, fmt.ShardRows(layers={LAYER: rows_RD[start:stop]}, fields=nowhere))
    return Documents(ActivationStore(folder), LAYER)


def named(accuracies: probing.Accuracies) -> dict[str, Any]:
    """Per-class results, named as sae-bench names them."""
    return {f"sae_{'' if k == 'all' else f'top_{k}_'}test_accuracy": by_class for k, by_class in accuracies.items()}


class Cost:
    """Seconds, processor seconds and peak memory of what runs `with` it, over all its turns."""

    def __init__(self) -> None:
        self.seconds = self.processor = 0.0
        self.peak = 0

    def __enter__(self) -> None:
        reset_peak_memory()
        self._started = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started[0]
        self.processor += time.process_time() - self._started[1]
        self.peak = max(self.peak, peak_memory())


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Every SAE by sae-bench and by us in turn."""
    stock = Stock(args, folder / "artifacts")
    d_in = stock.model.cfg.d_model
    saes = [random_sae(number, d_in, args.d_sae) for number in range(args.saes)]
    stock(saes[0])
    documents = as_store(folder / "artifacts" / f"{args.dataset.replace('/', '_')}_activations.pt", folder / "store")
    tasks = ProbeTasks(documents={args.dataset: documents}, k_values=K_VALUES, seed=42, draws=0)
    at_once = tasks.at_once(d_in, args.d_sae)
    groups = [saes[first : first + at_once] for first in range(0, len(saes), at_once)]
    ours, theirs, two, all_again = Cost(), Cost(), Cost(), Cost()
    compared = 0
    for group in groups:
        with ours:
            scored = [named(found.scores[args.dataset]) for found in tasks.of_saes(group) if isinstance(found, Probing)]
        for sae, results in zip(group, scored, strict=True):
            with theirs:
                expected = stock(sae)[f"{args.dataset}_results"]
            for metric, by_class in results.items():
                assert by_class == expected[metric], f"{metric}: the numbers differ"
                compared += len(by_class)
    with two:
        tasks.of_saes(saes[:2])
    with all_again:
        for group in groups:
            tasks.of_saes(group)
    rows = [
        ("sae-bench, cached", theirs, ""),
        (f"ours, {at_once} at once", ours, "3"),
        ("ours again, the first two SAEs", two, ""),
        (f"ours again, all {args.saes} SAEs", all_again, ""),
    ]
    show(
        f"{args.saes} SAEs, {args.dataset} {args.train} / {args.test}, d_in {d_in}, d_sae {args.d_sae}: "
        f"{compared} numbers, all equal",
        ["", "seconds", "x faster", "at least", "CPU seconds", "x less CPU", "peak MB"],
        [
            [
                name, f"{cost.seconds:.1f}", f"{theirs.seconds / cost.seconds:.2f}" if cost is not two else "", least,
                f"{cost.processor:.1f}", f"{theirs.processor / cost.processor:.2f}" if cost is not two else "",
                f"{cost.peak / 1e6:.0f}",
            ]
            for name, cost, least in rows
        ],
    )  # fmt: skip


def main() -> None:
    """Read the arguments and compare in a temporary folder."""
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
        os.environ["HF_DATASETS_CACHE"] = str(Path(temporary) / "datasets")
        compare(args, Path(temporary))


if __name__ == "__main__":
    main()
