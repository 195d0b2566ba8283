"""Extraction end to end, against the bare forward pass of the same model and against SAELens' `CacheActivationsRunner`.

    python benchmarks/extraction.py bare [--model FOLDER --corpus FILE.parquet]     without: Gemma-2-2B's width, 6 layers
    python benchmarks/extraction.py peers --model FOLDER --corpus FILE.parquet      a small Gemma-2 model and its tokenizer

End to end is tokenizing, forward, writing, syncing, checksums, manifest; loading the model is not counted for anybody. Each
contestant of `peers` runs in a process of its own; SAELens once with glibc's allocator as it comes, and once told to keep
what is freed, which our extraction does for itself (`pipeline.runtime.compatibility.keep_freed_memory`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from measure import interleaved, peak_memory, reset_peak_memory, show

from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.storage import Storage
from pipeline.artefacts.workspace import Workspace
from pipeline.extract.fill import filling, publish
from pipeline.extract.shards import run_shard
from pipeline.models.language import ResidualStream, transformers
from pipeline.runtime.compatibility import importing_sae_bench, keep_freed_memory
from pipeline.store import format as fmt
from pipeline.store.writer import ShardWriter
from pipeline.texts import packing

CONTEXT, LAYER = 128, 3
KEEP_FREED = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(2**28),
}  # fmt: skip


def texts_of(path: str) -> Iterator[str]:
    """The column `text` of a parquet file."""
    for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
        yield from batch.column("text").to_pylist()


def extract(
    model: ResidualStream, sequences: Callable[[], fmt.Sequences], rows: int, batch: int, dtype: str, folder: Path
) -> Storage:
    """Fill and publish a store in a new workspace below `folder`; `sequences` makes its tokens."""
    text = sequences()
    layout = fmt.Layout.model_validate(
        {
            "rows": min(rows, text.rows), "shard_rows": min(32768, rows // 2), "chunk_rows": 1024,
            "layers": model.layers, "d_in": model.d_in, "dtype": dtype, "codec": "raw", "row_order": "shuffled",
            "seed": 0, "special_ids": (0, 1, 2), "provenance": {},
        }
    )  # fmt: skip
    artefact = Artefact(kind="stores", label="benchmark", inputs={"rows": rows, "dtype": dtype})
    workspace = Workspace(tempfile.mkdtemp(dir=folder))
    storage = workspace.storage(artefact)
    with workspace.lock(artefact):
        fmt.create(storage, fmt.NewStore(layout=layout, sequences=text))
    writer = ShardWriter(storage)
    with filling(artefact, workspace, writer, writer.missing()) as store:
        for shard in store.claimed():
            store.commit(shard, run_shard(shard, layout, text, model, batch))
    publish(artefact, workspace, 0.0)
    return storage


def gemma_width(folder: Path) -> str:
    """A Gemma-2-2B of six layers with random weights and a small vocabulary, saved with a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = transformers.Gemma2Config(num_hidden_layers=6, vocab_size=512)
    model: Any = transformers.Gemma2ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    alphabet = {letter: 3 + index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    specials = {"<pad>": 0, "<eos>": 1, "<bos>": 2}
    tokenizer = Tokenizer(models.BPE(vocab=specials | alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    ).save_pretrained(folder)
    return str(folder)


def bare(args: argparse.Namespace, folder: Path) -> None:
    """Our extraction and the bare forward pass in turn, in one process and so with the same allocator settings."""
    keep_freed_memory()
    wide = args.model is None
    place = gemma_width(folder / "model") if wide else args.model
    layers, rows, batch = ((1, 3, 5), args.tokens or 8192, 8) if wide else ((LAYER,), args.tokens or 262144, 64)
    model = ResidualStream(place, layers=layers, dtype="bfloat16")
    texts = (lambda: iter(["def f(x):\n    return x\n" * 4] * 10**6)) if wide else partial(texts_of, args.corpus)
    pack = partial(packing.pack, tokenizer=model.tokenizer, context=CONTEXT, rows=rows)
    tokens_SL = torch.from_numpy(pack(texts()).tokens_SL).long()

    @torch.no_grad()
    def forward() -> None:
        for tokens in tokens_SL.split(batch):
            model.model(input_ids=tokens, use_cache=False)

    timings = interleaved(
        {
            "bare forward": forward,
            "extraction": lambda: extract(model, lambda: pack(texts()), rows, batch, "bfloat16", folder),
        },
        args.rounds,
    )
    rate = {name: rows / timing.seconds for name, timing in timings.items()}
    bar = "0.95" if wide else "0.85"
    what = "Gemma-2-2B's width, 6 layers, random weights" if wide else Path(args.model).name
    show(
        f"{what}, bfloat16, batch {batch}, {rows:,} rows",
        ["", "rows / s", "of bare", "at least"],
        [[name, f"{value:,.0f}", f"{value / rate['bare forward']:.3f}", bar] for name, value in rate.items()],
    )


def ours(args: argparse.Namespace, folder: Path, dtype: str, batch: int) -> dict[str, float]:
    """One run of ours, model and store in `dtype`."""
    keep_freed_memory()
    model = ResidualStream(args.model, layers=(LAYER,), dtype=dtype)
    pack = partial(packing.pack, tokenizer=model.tokenizer, context=CONTEXT, rows=args.tokens)
    reset_peak_memory()
    began = time.perf_counter()
    store = extract(model, lambda: pack(texts_of(args.corpus)), args.tokens, batch, dtype, folder)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "rows": args.tokens, "peak": peak_memory(), "bytes": sum(store.sizes().values())}


def saelens(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One run of SAELens' cache at its defaults (float32), on the same text."""
    with importing_sae_bench():
        import sae_lens.cache_activations_runner as runner
        from datasets import Dataset
    model = hooked(args.model)
    runner.load_model = lambda *_, **__: model
    tokens = args.tokens // (32 * CONTEXT * 2) * (32 * CONTEXT * 2)
    text = Dataset(pq.read_table(args.corpus, columns=["text"]))
    config = runner.CacheActivationsRunnerConfig(
        dataset_path="local", model_name="local", model_batch_size=32, hook_name=f"blocks.{LAYER}.hook_resid_post",
        d_in=model.cfg.d_model, training_tokens=tokens, context_size=CONTEXT, device="cpu", dtype="float32", streaming=False,
        new_cached_activations_path=str(folder / "cache"), buffer_size_gb=(tokens // 2 * model.cfg.d_model * 4 + 1) / 1e9,
    )  # fmt: skip
    reset_peak_memory()
    began = time.perf_counter()
    cached = runner.CacheActivationsRunner(config, override_dataset=text).run()
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
    return {"seconds": seconds, "rows": len(cached) * CONTEXT, "peak": peak_memory(), "bytes": size}


def hooked(place: str) -> Any:
    """The same weights as a TransformerLens model in float32, nothing folded.

    tests/evaluate/test_parity.py has it too: neither folder imports the other, and the product needs no TransformerLens.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights

    source = transformers.Gemma2ForCausalLM.from_pretrained(place, dtype=torch.float32, attn_implementation="eager")
    its: Any = source.config
    config = HookedTransformerConfig(
        model_name="gemma-2-small", original_architecture="Gemma2ForCausalLM", device="cpu", dtype=torch.float32,
        init_weights=False, default_prepend_bos=True,
        d_model=its.hidden_size, d_head=its.head_dim, d_mlp=its.intermediate_size, d_vocab=its.vocab_size,
        n_layers=its.num_hidden_layers, n_heads=its.num_attention_heads, n_key_value_heads=its.num_key_value_heads,
        n_ctx=its.max_position_embeddings, eps=its.rms_norm_eps, act_fn="gelu_pytorch_tanh", gated_mlp=True,
        normalization_type="RMS", final_rms=True, use_normalization_before_and_after=True,
        positional_embedding_type="rotary", rotary_base=10000, rotary_dim=its.head_dim,
        use_attn_scale=True, attn_scale=its.query_pre_attn_scalar**0.5, attn_scores_soft_cap=its.attn_logit_softcapping,
        output_logits_soft_cap=its.final_logit_softcapping, use_local_attn=True, window_size=its.sliding_window,
        attn_types=["local" if kind.startswith("sliding") else "global" for kind in its.layer_types],
    )  # fmt: skip
    model = HookedTransformer(config, tokenizer=transformers.AutoTokenizer.from_pretrained(place))
    with torch.no_grad():
        weights = convert_gemma_weights(source, config)
    model.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model.eval()


CONTESTANTS = {
    "SAELens, float32": saelens,
    "ours, float32": partial(ours, dtype="float32", batch=32),
    "ours, bfloat16": partial(ours, dtype="bfloat16", batch=64),
}


def peers(args: argparse.Namespace) -> None:
    """Every contestant in its own process, in turn, `rounds` times."""
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for name in CONTESTANTS:
            for label, extra in ((name, {}), (f"{name}, memory kept", KEEP_FREED)):
                if name.startswith("ours") and extra:
                    continue  # it does so in any case
                command = [
                    sys.executable,
                    __file__,
                    "one",
                    "--contestant",
                    name,
                    "--model",
                    args.model,
                    "--corpus",
                    args.corpus,
                ]
                output = subprocess.run(
                    [*command, "--tokens", str(args.tokens)], check=True, stdout=subprocess.PIPE, env=os.environ | extra
                )
                runs.setdefault(label, []).append(json.loads(output.stdout.splitlines()[-1]))
    median = {label: {key: statistics.median(run[key] for run in of) for key in of[0]} for label, of in runs.items()}
    rate = {label: value["rows"] / value["seconds"] for label, value in median.items()}
    base = median["SAELens, float32"]
    show(
        f"Extraction of {args.tokens:,} tokens, {Path(args.model).name}, layer {LAYER}",
        ["", "tokens / s", "x SAELens", "bytes a token", "x", "peak MB", "x"],
        [
            [
                label, f"{rate[label]:,.0f}", f"{rate[label] / rate['SAELens, float32']:.2f}",
                f"{value['bytes'] / value['rows']:.0f}",
                f"{value['bytes'] / value['rows'] / (base['bytes'] / base['rows']):.2f}",
                f"{value['peak'] / 1e6:.0f}", f"{value['peak'] / base['peak']:.2f}",
            ]
            for label, value in median.items()
        ],
    )  # fmt: skip


def main() -> None:
    """Run the comparison that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["bare", "peers", "one"])
    parser.add_argument("--model")
    parser.add_argument("--corpus")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--contestant", choices=CONTESTANTS)
    args = parser.parse_args()
    if args.which == "peers":
        args.tokens = args.tokens or 499_712
        peers(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.which == "bare":
            bare(args, Path(folder))
        else:
            print(json.dumps(CONTESTANTS[args.contestant](args, Path(folder))))


if __name__ == "__main__":
    main()
