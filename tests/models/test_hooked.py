"""The HookedTransformer of a model against transformers, and the models that TransformerLens has no form for."""

from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, VOCABULARY, save_model

from pipeline.errors import BadInputError
from pipeline.models.hooked import hooked_model
from pipeline.models.language import LanguageModel, ResidualStream
from pipeline.runtime.compatibility import importing_sae_bench, quiet_sae_bench

CPU = torch.device("cpu")


def test_it_computes_what_transformers_does(tmp_path: Path) -> None:
    folder = str(save_model(tmp_path / "model", CONFIGS["gemma-2"]))
    tokens_SL = torch.randint(4, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0))
    with importing_sae_bench(), quiet_sae_bench(), torch.no_grad():
        hooked = hooked_model(folder, revision=None, dtype="float32", device=CPU)
        logits_SLV, cache = hooked.run_with_cache(tokens_SL, names_filter=["blocks.2.hook_resid_post"])
        expected_SLV = LanguageModel(folder, dtype="float32", device=CPU).model(tokens_SL).logits
    torch.testing.assert_close(logits_SLV, expected_SLV, rtol=1e-4, atol=1e-4)
    stream = ResidualStream(folder, layers=(2,), dtype="float32", device=CPU)
    torch.testing.assert_close(cache["blocks.2.hook_resid_post"], stream(tokens_SL)[2], rtol=1e-4, atol=1e-4)


def test_a_model_without_a_form_is_told_in_one_line(tmp_path: Path) -> None:
    folder = str(save_model(tmp_path / "gemma", CONFIGS["llama"]))  # TransformerLens goes by the folder's name here
    with (
        importing_sae_bench(),
        pytest.raises(BadInputError, match=r"TransformerLens has no form for .*gemma, and sae-bench needs") as caught,
    ):
        hooked_model(folder, revision=None, dtype="float32", device=CPU)
    assert "\n" not in str(caught.value)


def test_a_fault_of_the_conversion_is_not_called_a_missing_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(save_model(tmp_path / "model", CONFIGS["gemma-2"]))

    def broken(*_: object) -> None:
        raise AttributeError("no such attribute")

    with importing_sae_bench():
        monkeypatch.setattr("transformer_lens.pretrained.weight_conversions.gemma.convert_gemma_weights", broken)
    with importing_sae_bench(), pytest.raises(AttributeError, match="no such attribute"):
        hooked_model(folder, revision=None, dtype="float32", device=CPU)
