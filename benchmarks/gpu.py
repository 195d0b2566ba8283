"""The product on one GPU: its ceilings, training steps beside other trainers, whole cohorts, and extraction at Gemma's size.

    python benchmarks/gpu.py                              about six minutes on an H100
    python benchmarks/gpu.py --only ceilings,steps        some of it

Times are medians of elapsed time between two waits for the device, so they hold what Python and launching kernels cost.
Launches, waits and the device's own busy time come from torch's profiler. Activations and weights are random; the shapes are
those of Gemma-2-2B. A part that fails is named and the rest goes on; peers whose packages are not installed are left out.
"""

import argparse
import contextlib
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from measure import show
from torch.profiler import ProfilerActivity, profile

from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.workspace import Workspace
from pipeline.evaluate.bench import Bench, LayerBench, ProbeScores
from pipeline.evaluate.evaluation import evaluate
from pipeline.evaluate.reconstruction import measure_reconstruction
from pipeline.extract.extraction import extract
from pipeline.extract.fill import filling, publish
from pipeline.extract.shards import run_shard
from pipeline.models.language import ResidualStream, transformers
from pipeline.runtime import compiled
from pipeline.runtime.compatibility import importing_sae_bench, keep_freed_memory
from pipeline.runtime.precision import tensor_cores
from pipeline.sae.finished import open_sae
from pipeline.store import format as fmt
from pipeline.store.batches import shuffled_batches
from pipeline.store.reader import ActivationStore
from pipeline.store.writer import ShardWriter
from pipeline.study.arms import ARMS, Recipes
from pipeline.study.evaluations import EVALUATIONS
from pipeline.study.experiment import Experiment
from pipeline.study.penalties import Contrast
from pipeline.study.plan import make_plan
from pipeline.study.recipe import TrainConfig
from pipeline.study.stage_code import imported
from pipeline.train import on_gpu
from pipeline.train.cohort import Member, train_cohort
from pipeline.train.pair_selection import thresholds
from pipeline.train.step import Trainer
from pipeline.train.training import train
from pipeline.train.weights import decoder_norms

GPU = torch.device("cuda")
D_IN, BATCH, L0 = 2304, 2048, 50
WIDTHS = (2304, 16384)
STEPS = 1_000_000
"""Total steps that schedules are told, so that none ends here."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
TABLE = [name for name, arm in ARMS.items() if arm.run is not None]
Step = Callable[[torch.Tensor], object]


def milliseconds(call: Callable[[], object], rounds: int, calls: int = 1) -> float:
    """Median over rounds of the elapsed time of one call, made `calls` times between two waits for the device."""
    call()
    taken: list[float] = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - began) / calls * 1e3)
    return statistics.median(taken)


def elapsed(call: Callable[..., object], *arguments: object) -> float:
    """Seconds of one call."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    call(*arguments)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def counts(call: Callable[[], object]) -> tuple[int, int, float]:
    """Kernels and copies that one call launches, waits for the device, and milliseconds that the device is busy."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as measured:
        call()
        torch.cuda.synchronize()
    events = list(measured.events() or ())
    on_device = [event for event in events if event.device_type.name == "CUDA"]
    waits = sum(event.name in WAITS for event in events) - 2  # the one above and the profiler's
    return len(on_device), waits, sum(event.time_range.elapsed_us() for event in on_device) / 1e3


def rows() -> torch.Tensor:
    """A batch with E||x||^2 = 1."""
    return torch.randn(BATCH, D_IN, device=GPU) / math.sqrt(D_IN)


def trainer(d_sae: int, l0: float = L0, **changes: object) -> Trainer:
    """A Trainer on whose batches `l0` latents fire per row."""
    config = TrainConfig.model_validate(
        {"d_sae": d_sae, "steps": STEPS, "batch_size": BATCH, "contrast": None, "resets": None} | changes
    )
    made = Trainer(config=config, d_in=D_IN, seed=0, device=GPU)
    # Encoder rows of norm 0.1 on rows of norm 1: pre-activations are normal, of this deviation.
    deviation = 0.1 / math.sqrt(D_IN)
    made.weights.b_enc_F.fill_(torch.special.ndtri(torch.tensor(l0 / d_sae)).item() * deviation)
    return made


def ceilings() -> None:
    """What the card can do at best."""
    lines: list[list[str]] = []
    for name, dtype, tf32 in (
        ("float32", torch.float32, False), ("TF32", torch.float32, True), ("bfloat16", torch.bfloat16, False)
    ):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(8192, 8192, device=GPU, dtype=dtype) for _ in range(2))
        lines.append([f"product, {name}", f"{2 * 8192**3 / milliseconds(lambda a=a, b=b: a @ b, 5, 3) / 1e9:.0f} TFLOP/s"])
    torch.backends.cuda.matmul.allow_tf32 = False
    source, to = (torch.empty(2**31, dtype=torch.uint8, device=GPU) for _ in range(2))
    rate = 2**32 / milliseconds(lambda: to.copy_(source), 5) / 1e6
    lines.append(["copy on the device, read and written", f"{rate:.0f} GB/s"])
    pageable = torch.zeros(BATCH, D_IN)
    pinned = pageable.pin_memory()
    batch = torch.empty(BATCH, D_IN, device=GPU)
    for name, host in (("pageable", pageable), ("pinned", pinned)):
        rate = host.nbytes / milliseconds(lambda host=host: batch.copy_(host, non_blocking=True), 5, 10) / 1e6
        lines.append([f"a batch to the device, {name}", f"{rate:.1f} GB/s"])
    show(torch.cuda.get_device_name(), ["", "at best"], lines)


MANNERS = ("as written", "compiled", "recorded")
"""Operation by operation; what lies between products compiled; and the whole step replayed as a CUDA graph."""


@contextmanager
def stepping(manner: str) -> Generator[None]:
    """Inside the block, steps are taken in this manner."""
    plain_steps, can_compile = compiled.PLAIN_CALLS, compiled.can_compile
    compiled.PLAIN_CALLS = plain_steps if manner == "recorded" else STEPS
    if manner == "as written":
        compiled.can_compile = lambda: False
    try:
        with tensor_cores(GPU):
            yield
    finally:
        compiled.PLAIN_CALLS, compiled.can_compile = plain_steps, can_compile


def steps() -> None:
    """One step of each kind in each manner, and the thresholds."""
    bfloat16: dict[str, object] = {"precision": "bfloat16", "contrast": {"pair_refresh": STEPS, "precision": "bfloat16"}}
    recipes: dict[str, dict[str, object]] = {
        "vanilla, float32": {},
        "vanilla, bfloat16": {"precision": "bfloat16"},
        "contrast, float32": {"contrast": {"pair_refresh": STEPS}},
        "contrast, bfloat16": bfloat16,
        "unweighted, bfloat16": bfloat16 | {"contrast": {"weighted": False, "precision": "bfloat16", "pair_refresh": STEPS}},
    }
    lines: list[list[str]] = []
    for d_sae in WIDTHS:
        for name, changes in recipes.items():
            for manner in MANNERS:
                with stepping(manner):
                    torch.cuda.reset_peak_memory_stats()
                    made, x_BD = trainer(d_sae, L0, **changes), on_gpu.batch(rows())[0]
                    call = lambda made=made, x_BD=x_BD: made.step(x_BD)  # noqa: E731 - two uses
                    for _ in range(compiled.PLAIN_CALLS % STEPS + 1):
                        call()
                    launches, waits, busy = counts(call)
                    taken = milliseconds(call, 5, 20 if d_sae == WIDTHS[0] else 5)
                share = 10 * BATCH * D_IN * d_sae / (taken / 1e3) / 757e12
                numbers = f"{taken:.3f}", f"{busy:.3f}", f"{launches:,}", f"{waits}", f"{share:.1%}"
                lines.append([f"{name}, F {d_sae}, {manner}", *numbers, f"{torch.cuda.max_memory_allocated() / 1e6:,.0f}"])
                del made, call
        with tensor_cores(GPU):
            kept = trainer(d_sae, contrast={}).weights.W_dec_FD
            launches, waits, busy = counts(lambda kept=kept: thresholds(kept, decoder_norms(kept), Contrast()))
            taken = milliseconds(lambda kept=kept: thresholds(kept, decoder_norms(kept), Contrast()), 3)
        lines.append([f"thresholds, F {d_sae}", f"{taken:.3f}", f"{busy:.3f}", f"{launches:,}", f"{waits}", "", ""])
    columns = ["a step of", "ms", "device busy ms", "kernels", "waits", "products of 757 TFLOP/s", "peak MB"]
    show(f"Training steps, d_in {D_IN}, batch {BATCH}", columns, lines)


def kernels() -> None:
    """What a recorded step of an arm under the contrast spends its time on."""
    for d_sae in WIDTHS:
        with tensor_cores(GPU):
            made = trainer(d_sae, L0, precision="bfloat16", contrast={"pair_refresh": STEPS, "precision": "bfloat16"})
            x_BD, _ = on_gpu.batch(rows())
            for _ in range(compiled.PLAIN_CALLS + 2):
                made.step(x_BD)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as measured:
                made.step(x_BD)
                torch.cuda.synchronize()
        taken: dict[str, list[float]] = {}
        for event in measured.events() or ():
            if event.device_type.name == "CUDA":
                taken.setdefault(event.name, []).append(event.time_range.elapsed_us())
        ordered = sorted(taken.items(), key=lambda item: -sum(item[1]))
        lines = [[name[:100], f"{len(times)}", f"{sum(times):.1f}"] for name, times in ordered]
        show(f"Kernels of a step under the contrast, F {d_sae}", ["", "times", "us"], lines)


def dictionary_learning(d_sae: int) -> Step:
    """`StandardTrainer.update`, as its own training loop calls it."""
    # Only its activation buffers, which are not used here, need nnsight.
    sys.modules.setdefault("nnsight", types.SimpleNamespace(LanguageModel=object))  # pyright: ignore[reportArgumentType]
    from dictionary_learning.trainers.standard import StandardTrainer

    theirs = StandardTrainer(steps=STEPS, activation_dim=D_IN, dict_size=d_sae, layer=0, lm_name="", device="cuda")
    state = iter(range(STEPS))
    return lambda x_BD: theirs.update(next(state), x_BD)


def saelens(d_sae: int, *, autocast: bool) -> Step:
    """SAELens' `SAETrainer.step` on a standard SAE, without its logging."""
    with importing_sae_bench():
        from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

    config = SAETrainerConfig(
        total_training_samples=STEPS * BATCH, train_batch_size_samples=BATCH, lr_end=3e-5, autocast=autocast, device="cuda",
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D_IN, d_sae=d_sae, l1_coefficient=0.04, device="cuda"))
    return SAETrainer(cfg=config, sae=sae, data_provider=iter(())).step


def peers() -> None:
    """Other trainers' steps beside ours, in turn on the same batch."""
    lines: list[list[str]] = []
    for d_sae in WIDTHS:
        made: dict[str, Callable[[], Step]] = {
            "ours, float32": lambda d_sae=d_sae: trainer(d_sae).step,
            "ours, bfloat16": lambda d_sae=d_sae: trainer(d_sae, precision="bfloat16").step,
            "dictionary_learning, float32": lambda d_sae=d_sae: dictionary_learning(d_sae),
            "SAELens, float32": lambda d_sae=d_sae: saelens(d_sae, autocast=False),
            "SAELens, autocast": lambda d_sae=d_sae: saelens(d_sae, autocast=True),
        }
        x_BD = rows()
        for name, make in made.items():
            try:
                step = make()
                taken = milliseconds(lambda step=step, x_BD=x_BD: step(x_BD), 5, 10)
            except Exception as error:  # theirs, or not installed
                print(f"left out: {name}: {type(error).__name__}: {error}")
                continue
            lines.append([f"{name}, F {d_sae}", f"{taken:.2f}"])
    show("Steps of other trainers, as they come (no TF32)", ["", "ms"], lines)


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


STUDY = """
description = "Random features at Gemma-2-2B's width."
[model]
source = "synthetic"
d_in = 2304
features = 4096
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
            on = Bench(layer, planned, sae, ProbeScores(model={}, sae={}))
            for evaluation in EVALUATIONS.values():
                if evaluation.needs <= layer.has:
                    compute = imported(evaluation.compute)
                    with torch.no_grad():
                        seconds = elapsed(compute, on)
                    lines.append([f"  {evaluation.name}, F {d_sae}", f"{seconds:.2f}"])
            l0 = on.once(measure_reconstruction).l0
            lines.append([f"  L0, F {d_sae}", f"{l0:.0f}"])
    show("A study of two SAEs, 131,072 rows held out", ["", "seconds"], lines)


def repeat() -> None:
    """Whether the GPU gives the same bits twice, and how far it is from the CPU after 30 steps of a small SAE."""
    lines: list[list[str]] = []
    for name, changes, l0 in (
        ("vanilla", {}, L0), ("contrast by blocks", {"contrast": {}}, 200), ("contrast by rows", {"contrast": {}}, 8)
    ):  # fmt: skip
        options = {"lr_warmup": 0, "l1_warmup": 0} | changes
        batches = [rows().cpu() for _ in range(30)]
        states: list[torch.Tensor] = []
        for device in (GPU, GPU, torch.device("cpu")):
            made = trainer(2304, l0, **options)
            moved = Trainer(config=made.config, d_in=D_IN, seed=0, device=device)
            moved.weights.b_enc_F.copy_(made.weights.b_enc_F)
            with tensor_cores(device):
                for x_BD in batches:
                    moved.step(x_BD.to(device))
            states.append(moved.weights.W_dec_FD.cpu())
        first, second, on_cpu = states
        moved_by = (on_cpu - trainer(2304, l0, **options).weights.W_dec_FD.cpu()).norm()
        lines.append([name, str(torch.equal(first, second)), f"{float((first - on_cpu).norm() / moved_by):.1e}"])
    show("30 steps of an SAE", ["", "same bits twice", "distance to the CPU's, of the way gone"], lines)


PARTS = {part.__name__: part for part in (ceilings, steps, kernels, repeat, cohorts, study, extraction, peers)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that were asked for, and print each table when it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    chosen = parser.parse_args(arguments).only.split(",")
    torch.manual_seed(0)
    for name in chosen:
        began = time.perf_counter()
        try:
            PARTS[name]()
        except Exception:
            traceback.print_exc()
        torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
