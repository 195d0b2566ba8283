"""SAEs of SAELens and `dictionary_learning`, read as the same functions."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cli import main
from pipeline.errors import BadInputError
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.sae.foreign import check_place, from_dictionary_learning, from_saelens
from pipeline.sae.formats import read_sae, write_sae

D_IN, D_SAE, K = 8, 24, 5


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def fill(module: Any) -> None:
    """Weights, biases and thresholds at random."""
    for name, tensor in module.named_parameters():
        tensor.data = 0.05 * torch.rand_like(tensor) if name == "threshold" else 0.3 * torch.randn_like(tensor)


def saelens(kind: str, folder: Path, **fields: Any) -> Any:
    with importing_sae_bench():
        import sae_lens
    config = getattr(sae_lens, f"{kind}SAEConfig")(d_in=D_IN, d_sae=D_SAE, **fields)
    sae = getattr(sae_lens, f"{kind}SAE")(config)
    fill(sae)
    sae.save_model(str(folder))
    return sae


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [("Standard", {}), ("TopK", {"k": K, "rescale_acts_by_decoder_norm": True}), ("JumpReLU", {}), ("Gated", {})],
)
def test_an_sae_of_saelens_is_the_same_function(kind: str, fields: dict[str, Any], centred: bool, tmp_path: Path) -> None:
    theirs = saelens(kind, tmp_path, apply_b_dec_to_input=centred, **fields)
    ours, _ = from_saelens(tmp_path)
    x_BD = torch.randn(50, D_IN)
    f_BF = ours.encode(x_BD)
    norm_F = theirs.W_dec.norm(dim=1)
    latents = theirs.encode(x_BD)
    latents = latents.to_dense() if latents.is_sparse else latents
    expected_BF = latents if kind == "TopK" else latents * norm_F  # its TopK encodes strengths and divides when it decodes
    torch.testing.assert_close(f_BF, expected_BF.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(f_BF), theirs(x_BD).detach(), rtol=1e-4, atol=1e-5)
    assert 0 < float((f_BF > 0).float().mean()) < 0.9
    torch.testing.assert_close(ours.W_dec_FD.norm(dim=1), torch.ones(D_SAE))
    write_sae(ours, tmp_path / "ours", {"model_name": "some"})
    torch.testing.assert_close(read_sae(tmp_path / "ours").encode(x_BD), f_BF)
    with importing_sae_bench():
        import sae_lens
    again: Any = sae_lens.SAE.load_from_disk(str(tmp_path / "ours"))
    latents = again.encode(x_BD)
    torch.testing.assert_close((latents.to_dense() if latents.is_sparse else latents).detach(), f_BF, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            "Temporal",
            {"n_heads": 1, "bottleneck_factor": 1},
            "no form for the architecture 'temporal'; standard, topk, jumprelu, gated have one",
        ),
        ("TopK", {"k": K}, "TopK selects by latents, and decoder norms are up to"),
        ("Standard", {"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm' changes rows before"),
    ],
)
def test_what_has_no_form_is_refused(kind: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    saelens(kind, tmp_path, **fields)
    with pytest.raises(BadInputError) as caught:
        from_saelens(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    saelens("Standard", tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(BadInputError, match=r"cannot be read by SAELens: SafetensorError: .*"):
        from_saelens(tmp_path)
    weights.unlink()
    with pytest.raises(BadInputError, match=r"has no sae_weights\.safetensors: it is no SAE in SAELens' format"):
        from_saelens(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"hook_name": "blocks.2.hook_mlp_out"}, "reads blocks.2.hook_mlp_out, not the residual stream after a layer"),
        ({"hook_name": "blocks.3.hook_resid_post"}, "was trained on layer 3, not on layer 2; set layer = 3"),
        ({"model_name": "gpt2"}, "was trained on gpt2, the study's model is google/gemma-2-2b; remove it"),
    ],
)
def test_another_place_is_refused(metadata: dict[str, str], message: str) -> None:
    with pytest.raises(BadInputError) as caught:
        check_place(metadata, Path("theirs"), 2, "google/gemma-2-2b")
    assert message in str(caught.value)
    check_place({"hook_name": "blocks.2.hook_resid_post", "model_name": "gemma-2-2b"}, Path("x"), 2, "google/gemma-2-2b")
    check_place({}, Path("x"), 2, "google/gemma-2-2b")


@pytest.fixture
def dictionaries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], Any]]:
    """Of `dictionary_learning`. The package imports nnsight, which only its activation buffers use."""
    monkeypatch.setitem(sys.modules, "nnsight", types.SimpleNamespace(LanguageModel=object))
    pytest.importorskip("dictionary_learning", reason="dictionary-learning is not installed (extra `bench`)")
    from dictionary_learning.dictionary import AutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    return {
        "AutoEncoder": lambda: AutoEncoder(D_IN, D_SAE),
        "AutoEncoderTopK": lambda: AutoEncoderTopK(D_IN, D_SAE, K),
        "BatchTopKSAE": lambda: BatchTopKSAE(D_IN, D_SAE, K),
        "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [8, 16]),
        "JumpReluAutoEncoder": lambda: JumpReluAutoEncoder(D_IN, D_SAE),
    }


def saved(theirs: Any, folder: Path, **fields: Any) -> None:
    trainer = {
        "dict_class": type(theirs).__name__,
        "layer": 3,
        "lm_name": "some/model",
        "submodule_name": "resid_post_layer_3",
    }
    folder.mkdir(exist_ok=True)
    torch.save(theirs.state_dict(), folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer | fields}))


@pytest.mark.parametrize(
    "kind", ["AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"]
)
def test_a_converted_dictionary_is_the_same_function(
    dictionaries: dict[str, Callable[[], Any]], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = dictionaries[kind]()
    fill(theirs)
    unit = kind in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
    decoder = theirs.W_dec.data if hasattr(theirs, "W_dec") else theirs.decoder.weight.data.T
    if unit:
        decoder /= decoder.norm(dim=1, keepdim=True)
        theirs.threshold.fill_(0.2)
    saved(theirs, tmp_path / "theirs")
    assert main_code(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    assert "convert: " in capsys.readouterr().out
    ours, metadata = from_saelens(tmp_path / "ours")
    assert metadata["hook_name"] == "blocks.3.hook_resid_post"
    x_BD = torch.randn(50, D_IN)
    expected_BF = theirs.encode(x_BD) * decoder.norm(dim=1)
    for sae in (ours, read_sae(tmp_path / "ours")):
        f_BF = sae.encode(x_BD)
        torch.testing.assert_close(f_BF, expected_BF.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sae.decode(f_BF), theirs(x_BD).detach(), rtol=1e-4, atol=1e-5)


def main_code(words: list[str]) -> int:
    sys.argv = ["dasae", *words]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemError('unpickled')",))


def test_only_tensors_are_unpickled(dictionaries: dict[str, Callable[[], Any]], tmp_path: Path) -> None:
    saved(dictionaries["AutoEncoder"](), tmp_path)
    torch.save({"bias": torch.zeros(3), "evil": Evil()}, tmp_path / "ae.pt")
    with pytest.raises(BadInputError, match=r"ae\.pt is not the state of AutoEncoder in tensors alone: ") as caught:
        from_dictionary_learning(tmp_path)
    assert "unpickled" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dict_class": "GatedAutoEncoder"}, "no form for the dictionary 'GatedAutoEncoder'; AutoEncoder, AutoEncoderTopK,"),
        ({"dict_class": "BatchTopKSAE"}, "ae.pt is not the state of BatchTopKSAE in tensors alone: 'threshold'"),
    ],
)
def test_other_dictionaries_are_refused(
    dictionaries: dict[str, Callable[[], Any]], fields: dict[str, str], message: str, tmp_path: Path
) -> None:
    saved(dictionaries["AutoEncoder"](), tmp_path, **fields)
    with pytest.raises(BadInputError) as caught:
        from_dictionary_learning(tmp_path)
    assert message in str(caught.value)


def test_a_batchtopk_without_a_threshold_is_refused(dictionaries: dict[str, Callable[[], Any]], tmp_path: Path) -> None:
    saved(dictionaries["BatchTopKSAE"](), tmp_path)
    with pytest.raises(BadInputError, match="has no threshold yet: it was trained for too few steps"):
        from_dictionary_learning(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BadInputError, match=r"config\.json says nothing of a trainer"):
        from_dictionary_learning(tmp_path)
