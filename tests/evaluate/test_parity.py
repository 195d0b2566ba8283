"""The sparse probing of a published study, against sae-bench's own runner on the same model, texts and SAE.

sae-bench runs the model as a TransformerLens HookedTransformer, whose activations differ from transformers' in the
last bits, and a single bit can change a probe. Both sides are therefore given the same activations: those that sae-bench
computed and cached are written, as they are, into a probe store.

Its order of random numbers is that of its cached runs: seeded once, then for every data set the probe on all latents and
the one for each k, each of them class by class. For a class the training problem is drawn (which negatives of every other
class, which of those, the shuffle), then the test problem likewise, then, for the full probe, its weights and its batches.
A first run differs: there, for each data set in turn, the model's own probes come before those of the SAE.
"""

import contextlib
import io
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import CONFIGS, D_IN, save_model
from torch import Tensor

from pipeline.artefacts.storage import LocalStorage
from pipeline.evaluate import probing
from pipeline.evaluate.tasks import ProbeTasks, Probing
from pipeline.models.language import ResidualStream, transformers
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.sae.sae import SAE
from pipeline.store import format as fmt
from pipeline.store.documents import SPLITS, Documents
from pipeline.store.reader import ActivationStore
from pipeline.store.writer import ShardWriter

LAYER, D_SAE, TRAIN, TEST, CONTEXT = 2, 48, 80, 40, 24
DATASETS = ["fancyzhx/ag_news", "canrager/amazon_reviews_mcauley_1and5_sentiment"]
K_VALUES = [1, 2, 5]
WORDS = [["alpha", "beta", "gamma"], ["red", "green", "blue"], ["one", "two", "three"], ["north", "south", "east"]]


def texts(generator: np.random.Generator, label: int, count: int) -> list[str]:
    """Mostly words of the class, some of the next one."""
    return [
        " ".join(
            str(generator.choice(WORDS[label if generator.random() < 0.7 else (label + 1) % 4]))
            for _ in range(generator.integers(3, 9))
        )
        for _ in range(count)
    ]


def write_data_sets(folder: Path) -> None:
    """Folders that `load_dataset` takes for Hub data sets when they lie in the working directory."""
    generator = np.random.default_rng(0)
    for split, rows in (("train", TRAIN), ("test", TEST)):
        news = [(text, label) for label in range(4) for text in texts(generator, label, rows)]
        table = pa.table({"text": [text for text, _ in news], "label": [label for _, label in news]})
        place = folder / "fancyzhx/ag_news"
        place.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, place / f"{split}.parquet")
        reviews = [(text, rating) for label, rating in enumerate((1.0, 5.0)) for text in texts(generator, label, rows)]
        table = pa.table(
            {
                "text": [text for text, _ in reviews],
                "label": [index % 2 for index in range(len(reviews))],
                "rating": [rating for _, rating in reviews],
            }
        )
        place = folder / "canrager/amazon_reviews_mcauley_1and5"
        place.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, place / f"{split}.parquet")


def hooked(place: Path) -> Any:
    """The same weights as a TransformerLens model, nothing folded."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gemma_weights

    source = transformers.Gemma2ForCausalLM.from_pretrained(place, dtype=torch.float32, attn_implementation="eager")
    its = source.config
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
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, padding_side="right")
    model = HookedTransformer(config, tokenizer=tokenizer, default_padding_side="right")
    with torch.no_grad():
        weights = convert_gemma_weights(source, config)
    model.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model.eval()


class StockSAE:
    """An SAE as sae-bench's runners want it."""

    def __init__(self, sae: SAE):
        self.sae, self.dtype = sae, torch.float32
        self.cfg = SimpleNamespace(hook_layer=LAYER, hook_name=f"blocks.{LAYER}.hook_resid_post")

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu((x - self.sae.b_dec_D) @ self.sae.W_enc_DF + self.sae.b_enc_F)


def some_sae() -> SAE:
    generator = torch.Generator().manual_seed(3)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=generator), dim=1)
    return SAE(
        W_enc_DF=W_dec_FD.T.contiguous(), b_enc_F=torch.full((D_SAE,), -0.05), W_dec_FD=W_dec_FD, b_dec_D=torch.zeros(D_IN)
    )


def stored(activations: dict[str, dict[str, Tensor]], folder: Path) -> Documents:
    """sae-bench's masked activations, by split and class, as a probe store: rows are the tokens it did not mask."""
    parts = [
        (x_LD, label, split)
        for split, name in enumerate(SPLITS)
        for label, x_SLD in enumerate(activations[name].values())
        for x_LD in x_SLD
    ]
    rows = [x_LD[x_LD.any(dim=1)] for x_LD, _, _ in parts]
    rows_RD, counts = torch.cat(rows), [len(x_RD) for x_RD in rows]
    layout = fmt.Layout(
        rows=len(rows_RD), shard_rows=4096, chunk_rows=512, layers=(LAYER,), d_in=D_IN, dtype="float32", codec="raw",
        row_order="document", seed=0, special_ids=(0, 1, 2), provenance={}, classes=tuple(activations["train"]),
    )  # fmt: skip
    tokens_SL = np.zeros((len(parts), CONTEXT), dtype=np.int32)
    sequences = fmt.Sequences(
        tokens_SL=tokens_SL,
        row_offsets=np.concatenate([[0], np.cumsum(counts)]),
        doc_starts=np.arange(len(parts), dtype=np.int64) * CONTEXT,
    )
    labels = fmt.Labels(
        label=np.array([label for _, label, _ in parts], dtype=np.int32),
        split=np.array([split for _, _, split in parts], dtype=np.uint8),
    )
    folder.mkdir()
    storage = LocalStorage(folder)
    fmt.create(storage, fmt.NewStore(layout=layout, sequences=sequences, labels=labels))
    writer = ShardWriter(storage)
    for shard in range(layout.shards):
        start, stop = layout.shard_range(shard)
        fields = fmt.RowFields(**dict.fromkeys(fmt.ROW_FIELDS, np.zeros(stop - start, dtype=np.int32)))
        writer.write(shard, fmt.ShardRows(layers={LAYER: rows_RD[start:stop]}, fields=fields))
    return Documents(ActivationStore(folder), LAYER)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A first and a cached run of sae-bench's runner, and the activations it cached."""
    with importing_sae_bench():
        from sae_bench.evals.sparse_probing import main
        from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    folder = tmp_path_factory.mktemp("saebench")
    write_data_sets(folder)
    place = save_model(folder / "model", CONFIGS["gemma-2"])
    before = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = hooked(place)
            config = SparseProbingEvalConfig(
                model_name="tiny", dataset_names=DATASETS, probe_train_set_size=TRAIN, probe_test_set_size=TEST,
                context_length=CONTEXT, llm_batch_size=16, llm_dtype="float32", k_values=K_VALUES,
            )  # fmt: skip
            first, cached = (
                main.run_eval_single_sae(config, StockSAE(some_sae()), model, "cpu", str(folder / "artifacts"))
                for _ in range(2)
            )
    finally:
        os.chdir(before)
    files = {name: folder / "artifacts" / f"{name.replace('/', '_')}_activations.pt" for name in DATASETS}
    activations = {name: torch.load(path, weights_only=True) for name, path in files.items()}
    return SimpleNamespace(
        first=first, cached=cached, activations=activations, model=model, place=place, config=config, folder=folder
    )


@pytest.fixture(scope="module")
def documents(stock: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Documents]:
    folder = tmp_path_factory.mktemp("stores")
    return {name: stored(acts, folder / str(number)) for number, (name, acts) in enumerate(stock.activations.items())}


def tasks(documents: dict[str, Documents]) -> ProbeTasks:
    return ProbeTasks(documents=documents, k_values=K_VALUES, seed=42, draws=0)


def test_every_number_of_a_cached_run_is_sae_bench_s(stock: SimpleNamespace, documents: dict[str, Documents]) -> None:
    sae = some_sae()
    (found,) = tasks(documents).of_saes([sae])
    assert isinstance(found, Probing)
    ours = found.scores
    means, theirs = stock.cached
    compared = 0
    for name in DATASETS:
        for k, by_class in ours[name].items():
            metric = "sae_test_accuracy" if k == "all" else f"sae_top_{k}_test_accuracy"
            assert by_class == theirs[f"{name}_results"][metric], (name, k)
            compared += len(by_class)
    assert compared == (4 + 2) * (1 + len(K_VALUES))
    assert probing.overall(ours)["5"] == pytest.approx(means["sae_top_5_test_accuracy"], abs=1e-12)
    # The SAE tells the classes apart, so that this is not a comparison of coin flips.
    assert probing.overall(ours)["all"] > 0.7


def test_the_model_s_own_numbers_are_those_of_a_first_run(stock: SimpleNamespace, documents: dict[str, Documents]) -> None:
    # Of its first data set: from the second on, a first run has drawn numbers for an SAE in between.
    first = DATASETS[0]
    ours = tasks({first: documents[first]}).of_model()[first]
    theirs = stock.first[1][f"{first}_results"]
    for k, by_class in ours.items():
        assert by_class == theirs["llm_test_accuracy" if k == "all" else f"llm_top_{k}_test_accuracy"], k


def test_sae_bench_s_first_run_is_another_measurement_than_its_cached_ones(stock: SimpleNamespace) -> None:
    assert stock.first[1] != stock.cached[1]


def test_our_activations_are_those_of_sae_bench_but_for_rounding(stock: SimpleNamespace) -> None:
    tokens_SL = torch.randint(4, 250, (3, CONTEXT), generator=torch.Generator().manual_seed(0))
    tokens_SL[:, 0] = 2
    ours = ResidualStream(str(stock.place), layers=(LAYER,), dtype="float32")(tokens_SL)[LAYER]
    name = f"blocks.{LAYER}.hook_resid_post"
    _, theirs = stock.model.run_with_cache(tokens_SL, names_filter=name)
    torch.testing.assert_close(ours, theirs[name], atol=1e-4, rtol=1e-4)
