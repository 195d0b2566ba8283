"""Estimates the disk space and time of an extraction before it starts."""

import time

import torch
from rich.filesize import decimal

from pipeline.models.language import DTYPES
from pipeline.models.model_section import KnownFeatures, TinyModel
from pipeline.runtime.devices import best_device, sae_device
from pipeline.runtime.precision import slower_choice
from pipeline.study.gpu_hours import MOST_CLASSES, WEIGHTS_PER_LAYER, rows_of
from pipeline.study.plan import Plan
from pipeline.texts.files import corpus_files
from pipeline.texts.text_sections import FilesCorpus

ROW_FIELD_BYTES = 20
"""Bytes of doc_id, sequence, position and token_id of one row, uncompressed."""
EFFICIENCY = 0.4
"""Share of the measured matrix-product rate that a forward pass reaches; attention and moving data take the rest."""
TYPICAL_GPU = 300e12
"""FLOP/s of an A100 in bfloat16, for estimates made on a machine without a GPU."""
BYTES_PER_TOKEN = 4
"""Bytes of a corpus's files for each token, as in English text. Compressed files hold more tokens."""


def describe(plan: Plan) -> str:
    """A few lines on rows, bytes on disk and time on this machine, whose speed is measured for about a second."""
    recipe, device = plan.experiment.train, sae_device(plan.experiment.run.device)
    slower = slower_choice(recipe.precision, recipe.batch_size, plan.experiment.model.d_in, recipe.d_sae, device)
    return "\n".join([*_extraction(plan), *([f"  training     {slower}"] if slower else [])])


def _extraction(plan: Plan) -> list[str]:
    experiment = plan.experiment
    store, model = experiment.store, experiment.model
    row_bytes = len(store.layers) * model.d_in * DTYPES[store.dtype].itemsize + ROW_FIELD_BYTES
    shards, rows = -(-store.tokens // store.shard_rows), rows_of(experiment)
    of_which = f", {rows.kept:,} of them kept" if rows.streamed else ""
    lines = [
        f"{experiment.name}: {plan.store.label}, layers {', '.join(map(str, store.layers))}, "
        f"d_in {model.d_in}, {store.dtype}",
        f"  activations  {store.tokens:,} rows in {shards:,} shards{of_which}, {decimal(rows.kept * row_bytes)}",
    ]
    if rows.streamed:
        lines.append(
            f"  streamed     {rows.streamed:,} rows are made for each group of SAEs that trains together, "
            f"at most {decimal(rows.ring * row_bytes)} on disk at a time"
        )
    if isinstance(experiment.corpus, FilesCorpus):
        lines.append(_held(experiment.corpus, store.tokens))
    if isinstance(model, KnownFeatures):
        return [*lines, f"  drawn        from {model.features:,} known features: no text, no model to run, no probes"]
    texts_per_class = (experiment.probes.train_size + experiment.probes.test_size) // 2
    documents = len(plan.probes) * MOST_CLASSES * texts_per_class
    probe_rows = documents * (experiment.probes.context - 1)
    flop = 2 * WEIGHTS_PER_LAYER * model.d_in**2 * (max(store.layers) + 1)
    device = best_device(experiment.run.device)
    rate = _matmul_flops(model.dtype, device)
    seconds = (rows.kept + probe_rows) * flop / (rate * EFFICIENCY)
    on_gpu = device.type != "cpu"
    lines += [
        f"  probe texts  at most {documents:,} texts of at most {experiment.probes.context} tokens, "
        f"at most {decimal(probe_rows * row_bytes)}",
        f"  forward      about {_duration(seconds)} on this {'GPU' if on_gpu else 'CPU'} "
        f"({rate / 1e12:.2g} TFLOP/s measured in {model.dtype}, {EFFICIENCY:.0%} of it assumed)",
    ]
    if rows.streamed:
        group = _duration(rows.streamed * flop / (rate * EFFICIENCY))
        lines.append(f"               about {group} more for each group of SAEs, while it trains")
    if isinstance(model, TinyModel):
        seen = model.steps * model.batch_size * store.context
        lines.insert(1, f"  model        trained here first, on {seen:,} tokens")
    elif not on_gpu:
        lines.append(
            f"               about {_duration(seconds * rate / TYPICAL_GPU)} on a GPU of {TYPICAL_GPU / 1e12:.0f} TFLOP/s"
        )
    return lines


def _held(corpus: FilesCorpus, asked: int) -> str:
    """What the corpus holds, beside what is asked of it. Only reading all of it would tell exactly."""
    files = corpus_files(corpus)
    size = sum(file.stat().st_size for file in files)
    few = size // BYTES_PER_TOKEN < asked
    return f"  corpus       {len(files):,} files, {decimal(size)}: about {size // BYTES_PER_TOKEN:,} tokens" + (
        f", fewer than the {asked:,} asked for (store.tokens)" if few else ""
    )


def _matmul_flops(dtype: str, device: torch.device) -> float:
    """FLOP/s of a square matrix product on a device of this machine."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    size = 1024 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device, dtype=DTYPES[dtype])
    torch.mm(a, a)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.3:
        torch.mm(a, a)
        done += 1
        wait()
    return done * 2 * size**3 / (time.perf_counter() - started)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
