"""The stages on one GPU: cohorts from a store, extraction at Gemma-2-2B's size, and a whole study."""

import contextlib
import os
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from gpu_timing import BATCH, D_IN, GPU, STEPS, counts, elapsed, milliseconds
from measure import show

from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.workspace import Workspace
from pipeline.evaluate.bench import Bench, LayerBench, ProbeScores
from pipeline.evaluate.evaluation import evaluate
from pipeline.evaluate.reconstruction import measure_reconstruction
from pipeline.extract.extraction import extract
from pipeline.extract.fill import filling, publish
from pipeline.extract.shards import run_shard
from pipeline.models.language import ResidualStream, transformers
from pipeline.runtime.compatibility import keep_freed_memory
from pipeline.sae.finished import open_sae
from pipeline.store import format as fmt
from pipeline.store.batches import shuffled_batches
from pipeline.store.reader import ActivationStore
from pipeline.store.writer import ShardWriter
from pipeline.study.arms import ARMS, Recipes
from pipeline.study.evaluations import EVALUATIONS
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan
from pipeline.study.recipe import TrainConfig
from pipeline.study.stage_code import imported
from pipeline.train.cohort import Member, train_cohort
from pipeline.train.step import Trainer
from pipeline.train.training import train

TABLE = [name for name, arm in ARMS.items() if arm.run is not None]
STUDY = """
description = "Random features at Gemma-2-2B's width."
[model]
source = "synthetic"
d_in = 2304
features = 256
[corpus]
source = "synthetic"
[store]
layers = [0]
tokens = 262_144
[train]
precision = "bfloat16"
d_sae = {d_sae}
steps = 60
batch_size = 2048
lr_warmup = 10
l1_warmup = 10
l1 = {l1}
heldout_shards = 4
resets = {{ every = 20, first = 20 }}
[train.contrast]
precision = "bfloat16"
pair_refresh = 10
[study]
layers = [0]
seeds = [0]
arms = ["baseline", "full"]
[evaluate]
k_values = [1]
"""


def random_store(folder: Path, rows: int) -> ActivationStore:
    """A finished store of one layer of random activations at Gemma's width."""
    layout = fmt.Layout.model_validate(
        {
            "rows": rows, "shard_rows": 16384, "chunk_rows": 1024, "layers": (12,), "d_in": D_IN, "dtype": "bfloat16",
            "codec": "raw", "row_order": "shuffled", "seed": 0, "special_ids": (0, 1, 2), "provenance": {},
        }
    )  # fmt: skip
    workspace = Workspace(str(folder))
    artefact = Artefact(kind="stores", label="random", inputs={"rows": rows})
    storage = workspace.storage(artefact)
    with workspace.lock(artefact):
        fmt.create(storage, fmt.NewStore(layout=layout, sequences=sequences(rows)))
    writer = ShardWriter(storage)
    with filling(artefact, workspace, writer, writer.missing()) as store:
        for shard in store.claimed():
            start, stop = layout.shard_range(shard)
            numbers = torch.arange(start, stop).numpy()
            fields = fmt.RowFields(
                doc_id=numbers, sequence=(numbers // 127).astype("int32"), position=(numbers % 127 + 1).astype("int32"),
                token_id=(numbers % 200 + 5).astype("int32"),
            )  # fmt: skip
            store.commit(shard, fmt.ShardRows(layers={12: torch.randn(stop - start, D_IN).bfloat16()}, fields=fields))
    publish(artefact, workspace, 0.0)
    return ActivationStore(storage)


def sequences(rows: int) -> fmt.Sequences:
    """Random tokens after a BOS, 128 in a sequence, that give at least `rows` rows."""
    count = -(-rows // 127)
    tokens_SL = torch.randint(5, 500, (count, 128), dtype=torch.int32)
    tokens_SL[:, 0] = 2
    starts = torch.arange(count) * 128
    offsets = torch.arange(count + 1) * 127
    return fmt.Sequences(tokens_SL=tokens_SL.numpy(), doc_starts=starts.numpy(), row_offsets=offsets.numpy())


def cohorts() -> None:
    """Whole cohorts of the eleven arms with reading, logging and everything: seconds per step, minutes per layer."""
    lines: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        store = random_store(Path(folder), 131_072)
        print(f"store: {store.rows:,} rows written at {store.bytes / 1e9 / (time.perf_counter() - began):.2f} GB/s")
        for d_sae, members, count, precision in (
            (2304, 1, 300, "bfloat16"), (2304, 33, 200, "float32"), (2304, 33, 200, "bfloat16"), (16384, 33, 20, "bfloat16")
        ):  # fmt: skip
            contrast = {"precision": precision, "pair_refresh": 10}
            options = {"precision": precision, "contrast": contrast, "lr_warmup": 5, "l1_warmup": 5}
            full = TrainConfig.model_validate({"d_sae": d_sae, "steps": STEPS, "batch_size": BATCH} | options)
            recipes = Recipes(full)
            trainers = [
                Trainer(config=recipes[arm], d_in=D_IN, seed=seed, device=GPU)
                for seed, arm in zip(range(members), cycle(TABLE), strict=False)
            ]
            batches = shuffled_batches(store, 12, store.shards, batch_size=BATCH, buffer_chunks=32, seed=0, device=GPU)
            with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
                cohort = [Member(trainer=made, log=nowhere) for made in trainers]
                seconds = [elapsed(train_cohort, cohort, batches, until, "cohort") for until in (10, count + 10)]
            taken = seconds[1] / count
            batches.close()
            minutes = f"{taken * 9280 / 60:.1f}"
            held = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
            lines.append(
                [
                    f"{members} SAEs, F {d_sae}, {precision}",
                    f"{seconds[0]:.0f}",
                    f"{count}",
                    f"{taken * 1e3:.2f}",
                    minutes,
                    held,
                ]
            )
            del trainers, cohort
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    columns = ["", "first 10 steps, s", "steps", "ms a step", "minutes for 9,280 steps", "peak GB"]
    show("Cohorts of the eleven arms from a store", columns, lines)


def gemma(folder: Path, depth: int) -> ResidualStream:
    """Gemma-2-2B cut after `depth` layers, with random weights, loaded as a downloaded one is."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = transformers.Gemma2Config(num_hidden_layers=depth)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(GPU):
        model: Any = transformers.Gemma2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    del model
    alphabet = {letter: 3 + index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={"<pad>": 0, "<eos>": 1, "<bos>": 2} | alphabet, merges=[]))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    ).save_pretrained(folder)
    return ResidualStream(str(folder), layers=(5, 12, 19), dtype="bfloat16")


def extraction() -> None:
    """Extraction of three layers: the bare forward, with the rows copied and put in order, and with the store written."""
    keep_freed_memory()
    lines: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        model = gemma(Path(folder) / "model", 20)
        print(f"model made, saved and loaded in {time.perf_counter() - began:.0f} s")
        rows = 65_536
        text = sequences(rows)
        layout = fmt.Layout.model_validate(
            {
                "rows": rows, "shard_rows": 16384, "chunk_rows": 1024, "layers": model.layers, "d_in": D_IN,
                "dtype": "bfloat16", "codec": "raw", "row_order": "shuffled", "seed": 0, "special_ids": (0, 1, 2),
                "provenance": {},
            }
        )  # fmt: skip
        for batch in (32, 128):
            tokens_SL = torch.from_numpy(text.tokens_SL[:batch]).long()
            launches, waits, busy = counts(lambda tokens_SL=tokens_SL: model(tokens_SL))
            bare = milliseconds(lambda tokens_SL=tokens_SL: model(tokens_SL), 5) / (batch * 127)
            shard = milliseconds(lambda batch=batch: run_shard(0, layout, text, model, batch), 2) / 16384
            artefact = Artefact(kind="stores", label="gemma", inputs={"batch": batch})
            workspace = Workspace(str(Path(folder) / "workspace"))
            storage = workspace.storage(artefact)
            with workspace.lock(artefact):
                fmt.create(storage, fmt.NewStore(layout=layout, sequences=text))
            writer = ShardWriter(storage)
            began = time.perf_counter()
            with filling(artefact, workspace, writer, writer.missing()) as store:
                for number in store.claimed():
                    store.commit(number, run_shard(number, layout, text, model, batch))
            publish(artefact, workspace, 0.0)
            whole = (time.perf_counter() - began) / rows * 1e3
            busy_each = busy / (batch * 127)
            rates = [f"{1e3 / value:,.0f}" for value in (busy_each, bare, shard, whole)]
            lines.append([f"{batch} x 128", f"{launches:,}", f"{waits}", *rates])
    columns = ["forward batch", "launches", "waits", "busy device", "bare forward", "with copies", "with the store"]
    show("Extraction, Gemma-2-2B's size, layers 5, 12, 19, bfloat16: rows a second", columns, lines)


def study() -> None:
    """A whole study of a synthetic model at Gemma's width, and the evaluations of one SAE one by one."""
    lines: list[list[str]] = []
    for d_sae, l1 in ((2304, 0.3), (16384, 0.3)):
        with tempfile.TemporaryDirectory() as folder:
            toml = Path(folder) / "study.toml"
            toml.write_text(STUDY.format(d_sae=d_sae, l1=l1))
            plan, workspace = make_plan(Experiment.load(str(toml))), Workspace(Path(folder) / "workspace")
            stages = {"extract": extract, "train": train, "evaluate": evaluate}
            for name, stage in stages.items():
                seconds = elapsed(stage, plan, workspace)
                lines.append([f"{name}, F {d_sae}", f"{seconds:.1f}"])
            layer, planned = LayerBench(plan, 0, workspace), plan.saes[0]
            sae = open_sae(planned.artefact, workspace).to(layer.device)
            on = Bench(layer, planned, sae, ProbeScores(model={}, sae=None))
            for evaluation in EVALUATIONS.values():
                if evaluation.needs <= layer.has:
                    compute = imported(evaluation.compute)
                    with torch.no_grad():
                        seconds = elapsed(compute, on)
                    lines.append([f"  {evaluation.name}, F {d_sae}", f"{seconds:.2f}"])
            l0 = on.once(measure_reconstruction).l0
            lines.append([f"  L0, F {d_sae}", f"{l0:.0f}"])
    show("A study of two SAEs, 131,072 rows held out", ["", "seconds"], lines)
