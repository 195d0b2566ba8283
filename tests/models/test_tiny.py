"""The small model trained on the spot: same files from same arguments, and usable as any other Gemma-2 model."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import BadInputError
from pipeline.models.language import ResidualStream
from pipeline.models.model_section import TinyModel
from pipeline.models.tiny import architecture, train_tiny_model, unigram_entropy
from pipeline.runtime.threads import one_thread

CONFIG = TinyModel(source="tiny", d_in=16, depth=2, vocabulary=300, steps=40, batch_size=8, learning_rate=2e-2)
CONTEXT = 16
TEXTS = [f"def function_{number}(value):\n    return value + {number}" for number in range(400)]


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Matrices this small only wait for a second thread."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("model")
    return folder, train_tiny_model(CONFIG, iter(TEXTS), CONTEXT, folder)


def test_training_beats_the_unigram_model(trained: tuple[Path, dict[str, Any]]) -> None:
    facts = trained[1]
    assert facts["heldout_loss"] < facts["unigram_entropy"] < facts["first_loss"]
    assert facts["last_loss"] < facts["first_loss"]
    assert facts["tokens_seen"] == 40 * 8 * CONTEXT


def test_equal_arguments_give_equal_files_and_leave_the_callers_random_state_alone(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    train_tiny_model(CONFIG, TEXTS, CONTEXT, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(names)
    assert names == sorted(path.name for path in trained[0].iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (trained[0] / name).read_bytes(), name


def test_another_seed_gives_another_model(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    train_tiny_model(CONFIG.model_copy(update={"seed": 1}), TEXTS, CONTEXT, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() != (trained[0] / "model.safetensors").read_bytes()


def test_tokenizer_has_gemmas_specials_and_gives_back_every_text(trained: tuple[Path, dict[str, Any]]) -> None:
    tokenizer = ResidualStream(str(trained[0]), layers=(0,), dtype="float32").tokenizer
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    assert ids == (0, 1, 2, 3)
    assert len(tokenizer) == CONFIG.vocabulary
    assert tokenizer.padding_side == "right"
    for text in ("def f(x):\n\treturn x", "  Grüße, 世界 \U0001f40d\r\n", "<not a special>"):
        encoded = tokenizer(text)["input_ids"]
        assert encoded[0] == tokenizer.bos_token_id
        assert 3 not in encoded
        assert tokenizer.decode(encoded, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_extraction_opens_the_saved_model(trained: tuple[Path, dict[str, Any]]) -> None:
    model = ResidualStream(str(trained[0]), layers=(0, 1), dtype="float32")
    hidden = model(torch.full((3, CONTEXT), 5))
    assert {layer: tuple(stream.shape) for layer, stream in hidden.items()} == dict.fromkeys((0, 1), (3, CONTEXT, 16))


def test_architecture_is_gemma_2s() -> None:
    config = architecture(CONFIG, CONTEXT)
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert config.tie_word_embeddings
    assert architecture(CONFIG, 512).max_position_embeddings == 512


def test_unigram_entropy_of_equally_frequent_tokens_is_the_log_of_their_number() -> None:
    assert unigram_entropy(torch.tensor([[2, 4, 5], [2, 6, 7]])) == pytest.approx(math.log(4))


def test_a_corpus_too_small_for_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="batch_size 8"):
        train_tiny_model(CONFIG, TEXTS[:2], CONTEXT, tmp_path)
