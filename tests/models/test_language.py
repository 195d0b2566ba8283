"""Models of every family are cut and hooked rightly, and one that cannot be used is refused in one line."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, D_IN, DEPTH, GEMMA, GEMMA_2_2B, POSITIONS, VOCABULARY, save_gemma_2_2b, save_model

from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError, ModelAccessError
from pipeline.extract.extraction import extract
from pipeline.models.access import check_available
from pipeline.models.language import ResidualStream, load_tokenizer, quiet_transformers, transformers
from pipeline.models.model_section import HuggingFaceModel
from pipeline.store.reader import ActivationStore
from pipeline.study.experiment import Experiment
from pipeline.study.plan import Plan, make_plan

GEMMA_STUDY = """
description = "The first layers of Gemma-2-2B in their real size, with random weights."
[model]
source = "huggingface"
name = "{folder}"
d_in = 2304
depth = 6
[corpus]
source = "files"
paths = ["{text}"]
[store]
layers = [2, 5]
tokens = 256
context = 128
forward_batch = 2
shard_rows = 128
chunk_rows = 64
[probes]
datasets = ["python/docstring-of"]
[train]
d_sae = 96
steps = 1
batch_size = 64
[study]
layers = [5]
arms = ["baseline"]
"""


def extract_store(plan: Plan, workspace: Workspace) -> None:
    """The activation store alone: probe texts would take minutes at this size."""
    extract(replace(plan, probes={}), workspace)


@pytest.fixture(scope="module", params=CONFIGS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, save_model(tmp_path_factory.mktemp(request.param), CONFIGS[request.param])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", CONFIGS["llama"])


def some_tokens(*shape: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(4, vocabulary, shape, generator=torch.Generator().manual_seed(0))


def whole_model(folder: Path, dtype: torch.dtype, attention: str) -> Any:
    with quiet_transformers():
        return transformers.AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cut_model_gives_what_the_whole_one_does(family: tuple[str, Path], dtype: torch.dtype) -> None:
    name, folder = family
    cut = ResidualStream(str(folder), layers=(0, 2), dtype=str(dtype).removeprefix("torch."))
    attention = "eager" if name == "gemma-2" else "sdpa"
    if name == "gpt-j":  # which has no fused attention
        attention = "eager"
    whole = whole_model(folder, dtype, attention)
    assert cut.model.config._attn_implementation == attention  # transformers has no public name for it
    assert (cut.depth, cut.d_in) == (DEPTH, D_IN)

    tokens_SL = some_tokens(3, 24)
    outputs = cut(tokens_SL)
    with torch.no_grad():
        hidden = whole(tokens_SL, output_hidden_states=True).hidden_states
    assert outputs.keys() == {0, 2}
    for layer, x_SLD in outputs.items():
        assert x_SLD.shape == (3, 24, D_IN)
        assert x_SLD.dtype == dtype
        assert torch.equal(x_SLD.cpu(), hidden[layer + 1]), layer

    names, loaded = ({name for name, _ in model.named_parameters()} for model in (whole, cut.model))
    assert names - loaded == {name for name in names if ".3." in name}
    assert loaded < names


def test_padding_on_the_right_changes_nothing(family: tuple[str, Path]) -> None:
    model = ResidualStream(str(family[1]), layers=(3,), dtype="float32")
    tokens_SL = some_tokens(2, 20)
    padded_SL = torch.nn.functional.pad(tokens_SL, (0, 12))
    torch.testing.assert_close(model(padded_SL)[3][:, :20], model(tokens_SL)[3], atol=1e-5, rtol=1e-5)


def test_a_sequence_longer_than_the_models_positions_is_refused(folder: Path) -> None:
    model = ResidualStream(str(folder), layers=(0,), dtype="float32")
    assert model(some_tokens(1, POSITIONS))[0].shape == (1, POSITIONS, D_IN)
    with pytest.raises(BadInputError, match=rf"has {POSITIONS} positions, fewer than a context of {POSITIONS + 1}"):
        model(some_tokens(1, POSITIONS + 1))


def test_a_text_longer_than_the_tokenizers_limit_is_no_warning(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 8}))
    tokenizer = ResidualStream(str(folder), layers=(0,), dtype="float32").tokenizer
    assert len(tokenizer("a long text " * 20)["input_ids"]) > 8
    assert "longer" not in capfd.readouterr().err


def refused(folder: Path) -> str:
    """The one line in which a model in a folder is refused."""
    declared = HuggingFaceModel(source="huggingface", name=str(folder), d_in=D_IN, depth=DEPTH, dtype="float32")

    def opened() -> ResidualStream:
        check_available(declared)
        return ResidualStream(declared.name, layers=(1,), dtype=declared.dtype)

    with pytest.raises(BadInputError) as caught:
        opened()
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def test_a_folder_that_lacks_something_says_what(folder: Path) -> None:
    weights = folder / "model.safetensors"
    torch.save({}, folder / "pytorch_model.bin")
    weights.rename(folder / "elsewhere")
    assert "has no .safetensors weights, and pickled ones are not loaded" in refused(folder)
    weights.write_bytes(b"torn")
    assert "the weights of" in refused(folder)
    (folder / "config.json").unlink()
    assert "holds no model: it has no config.json" in refused(folder)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_tokenizer_that_cannot_be_looked_at_for_a_moment_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """transformers takes the error for absence. At its second look, it would load a tokenizer of single characters."""
    expected, looks, real = load_tokenizer(str(folder))("some words")["input_ids"], -100, os.stat

    def stat(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        nonlocal looks
        looks += str(path).endswith("tokenizer.json")
        if looks == failing and str(path).endswith("tokenizer.json"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *arguments, **options)

    looks = 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        with pytest.raises(ModelAccessError, match="cannot be loaded"):
            load_tokenizer(str(folder))
    assert load_tokenizer(str(folder))("some words")["input_ids"] == expected


@pytest.mark.parametrize("family_name", ["llama", "gpt-2"])
def test_a_tokenizer_that_is_missing_or_torn_is_refused(tmp_path: Path, family_name: str) -> None:
    folder = save_model(tmp_path / "model", CONFIGS[family_name])
    (folder / "tokenizer.json").write_text("{")
    assert "the tokenizer of" in refused(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "the tokenizer of" in refused(folder)


@pytest.mark.parametrize("config", ["{", "{}", '{"model_type": "unheard-of"}'])
def test_a_configuration_that_means_nothing_is_refused(folder: Path, config: str) -> None:
    (folder / "config.json").write_text(config)
    assert "cannot be loaded" in refused(folder)


def test_weights_that_are_not_all_there_are_not_filled_with_random_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name, unfit = "model.layers.1.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight is missing or has another shape"
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors", {"format": "pt"})
    assert unfit in refused(folder)
    save_file(weights | {name: weights[name][:3]}, folder / "model.safetensors", {"format": "pt"})
    assert unfit in refused(folder)


def test_an_encoder_and_a_decoder_are_no_decoder_only_model(folder: Path) -> None:
    transformers.T5Config(d_model=D_IN, num_layers=DEPTH).save_pretrained(folder)
    assert "(t5) is not a decoder-only language model" in refused(folder)


@pytest.mark.slow
def test_gemma_2_2b_in_its_real_size(tmp_path: Path) -> None:
    folder = save_gemma_2_2b(tmp_path / "gemma")
    (tmp_path / "text.txt").write_text("\n".join(f"line {number} of a text" for number in range(200)))
    (tmp_path / "gemma.toml").write_text(GEMMA_STUDY.format(folder=folder, text=tmp_path / "text.txt"))
    plan, workspace = make_plan(Experiment.load(str(tmp_path / "gemma.toml"))), Workspace(tmp_path / "workspace")
    try:
        model = ResidualStream(str(folder), layers=(2, 5), dtype="bfloat16")
        outputs = model(some_tokens(2, 128, vocabulary=GEMMA_2_2B["vocab_size"]))
        assert model.model.config.layer_types == ["sliding_attention", "full_attention"] * 3
        extract_store(plan, workspace)
        store = ActivationStore(workspace.storage(plan.store))
        tokens_SL = torch.from_numpy(store.whole("tokens")[:2]).long()
        expected = model(tokens_SL)
    finally:
        shutil.rmtree(folder)
    for layer in (2, 5):
        assert outputs[layer].shape == (2, 128, 2304)
        assert outputs[layer].dtype == torch.bfloat16
        assert outputs[layer].isfinite().all()
    assert not torch.equal(outputs[2], outputs[5])

    assert (store.rows, store.layout.d_in, store.layout.layers) == (256, 2304, (2, 5))
    # 2 bytes a value; in each of 2 shards a checksum and an index entry for each of 2 chunks, and the index' own checksum.
    sizes = [check.bytes for commit in store.commits.values() for name, check in commit.files.items() if "layer" in name]
    assert sizes == [128 * 2304 * 2 + 2 * (4 + 16) + 4] * 4
    place = store.read_field("sequence", 0, 128) * 128 + store.read_field("position", 0, 128)
    for layer in (2, 5):
        rows_RD = expected[layer].flatten(0, 1)[torch.from_numpy(place)]
        torch.testing.assert_close(store.read(layer, 0, 128), rows_RD.cpu(), atol=0.05, rtol=0.05)


def test_an_encoder_is_refused_when_it_is_loaded(folder: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.5,
    )
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    transformers.BertModel(config).save_pretrained(folder)
    with pytest.raises(BadInputError, match="is not a decoder-only language model: its layers look at later tokens"):
        ResidualStream(str(folder), layers=(0, 1), dtype="float32")


@pytest.mark.parametrize(
    "config",
    [
        transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
        transformers.RecurrentGemmaConfig(**GEMMA | {"num_hidden_layers": 3}, lru_width=32),
    ],
    ids=["mamba", "recurrent-gemma"],
)
def test_a_recurrent_model_is_refused_when_it_is_loaded(folder: Path, config: transformers.PreTrainedConfig) -> None:
    save_model(folder, config)
    with pytest.raises(BadInputError, match=r"model cannot be cut after a layer; use a transformer$"):
        ResidualStream(str(folder), layers=(0, 1), dtype="float32")


def test_layers_that_return_lists_are_read(folder: Path) -> None:
    save_model(folder, transformers.OpenAIGPTConfig(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    outputs = ResidualStream(str(folder), layers=(0, 1), dtype="float32")(torch.tensor([[2, 5, 6, 7]]))
    assert [tuple(hidden_SLD.shape) for hidden_SLD in outputs.values()] == [(1, 4, 32), (1, 4, 32)]
