"""TopK and BatchTopK: which latents are kept, and that SAELens reads the finished SAE as the same function."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInputError, CorruptArtefactError
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.sae.formats import CONFIG, read_sae, write_sae
from pipeline.sae.topk import BatchTopK, JumpReLU, TopK, largest
from pipeline.study.arms import Recipes
from pipeline.study.recipe import ArmConfig, TrainConfig
from pipeline.train.step import Trainer

CONFIG_OF = {"d_sae": 40, "steps": 500, "batch_size": 64, "lr_warmup": 5, "l1_warmup": 5, "learning_rate": 1e-2}


def trained(activation: str, decoder_norm: str) -> Trainer:
    changes = {"activation": activation, "k": 4, "decoder_norm": decoder_norm, "contrast": {}, "resets": None}
    trainer = Trainer(config=TrainConfig.model_validate(CONFIG_OF | changes), d_in=12, seed=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        trainer.step(torch.randn(64, 12, generator=generator) / 12**0.5)
    return trainer


@given(st.integers(0, 2**31), st.integers(1, 12))
def test_topk_keeps_the_strongest_of_each_row(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pre_BF, norm_F = torch.randn(5, 12, generator=generator), torch.rand(12, generator=generator) + 0.1
    f_BF = TopK(k).in_training(pre_BF, norm_F)
    for pre_F, f_F in zip(pre_BF, f_BF, strict=True):
        strongest = sorted(range(12), key=lambda i: -float(pre_F[i] * norm_F[i]))[:k]
        expected = [float(pre_F[i]) if i in strongest and pre_F[i] > 0 else 0.0 for i in range(12)]
        assert f_F.tolist() == expected


@given(st.integers(0, 2**31), st.integers(1, 12))
def test_batchtopk_keeps_the_strongest_of_the_batch(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pre_BF, norm_F = torch.randn(5, 12, generator=generator), torch.rand(12, generator=generator) + 0.1
    activation = BatchTopK(k)
    for _ in range(2):  # the second time it has a guess
        f_BF = activation.in_training(pre_BF, norm_F)
        strength = (pre_BF.relu() * norm_F).flatten()
        kept = set(strength.topk(5 * k).indices.tolist()) if 5 * k < len(strength) else set(range(len(strength)))
        expected = [value if place in kept and value > 0 else 0.0 for place, value in enumerate(pre_BF.flatten().tolist())]
        assert f_BF.flatten().tolist() == expected


@given(st.lists(st.floats(0, 9, width=32), min_size=1, max_size=30), st.integers(1, 30), st.floats(0, 9))
def test_the_bound_does_not_depend_on_the_guess(values: list[float], count: int, guess: float) -> None:
    above = sorted((value for value in values if value > 0), reverse=True)
    expected = above[count - 1] if len(above) >= count else 0.0
    assert float(largest(torch.tensor(values), count, guess)) == expected


@pytest.mark.parametrize("decoder_norm", ["free", "unit"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_saelens_encodes_as_the_finished_sae_does(activation: str, decoder_norm: str, tmp_path: Path) -> None:
    with importing_sae_bench():
        import sae_lens
    finished = trained(activation, decoder_norm).finished(0.25)
    write_sae(finished, tmp_path, {})
    x_BD = torch.randn(200, 12) / 12**0.5 / 0.25
    f_BF = finished.encode(x_BD)
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    torch.testing.assert_close(theirs.encode(x_BD).to_dense(), f_BF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.decode(f_BF), finished.decode(f_BF), rtol=1e-5, atol=1e-5)
    assert float((f_BF > 0).sum(dim=1).float().mean()) == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_a_finished_sae_is_the_one_in_training_in_another_unit(activation: str) -> None:
    trainer = trained(activation, "free")
    x_BD = torch.randn(64, 12, generator=torch.Generator().manual_seed(9)) / 12**0.5
    weights, norm_F = trainer.weights, trainer.weights.W_dec_FD.norm(dim=1)
    pre_BF = (x_BD - weights.b_dec_D) @ weights.W_enc_DF + weights.b_enc_F
    if isinstance(trainer.activation, BatchTopK):
        assert trainer.activation.average is not None
        expected_BF = pre_BF.relu() * (pre_BF * norm_F > trainer.activation.average)
    else:
        expected_BF = trainer.activation.in_training(pre_BF, norm_F)
    torch.testing.assert_close(trainer.finished(0.5).encode(x_BD / 0.5), expected_BF * norm_F / 0.5, rtol=1e-4, atol=1e-5)


def test_an_average_of_thresholds_survives_a_checkpoint() -> None:
    trainer = trained("batchtopk", "free")
    resumed = Trainer(config=trainer.config, d_in=12, seed=3)
    resumed.load_state(trainer.state())
    one, other = (each.finished(1.0).activation for each in (trainer, resumed))
    assert isinstance(one, JumpReLU)
    assert isinstance(other, JumpReLU)
    assert torch.equal(one.threshold_F, other.threshold_F)


def test_an_sae_without_its_thresholds_is_refused(tmp_path: Path) -> None:
    finished = trained("topk", "free").finished(1.0)
    write_sae(finished, tmp_path, {})
    config = json.loads((tmp_path / CONFIG).read_text())
    for changes, message in (
        ({"architecture": "jumprelu"}, "is no jumprelu SAE: 'threshold'"),
        ({"k": "many"}, "is no topk SAE: invalid literal"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps(config | changes))
        with pytest.raises(CorruptArtefactError, match=message):
            read_sae(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "topk"}, "activation 'topk' needs k"),
        ({"k": 4}, "k 4 means nothing to activation 'relu'; set k = false, or choose 'topk' or 'batchtopk'"),
        ({"prefixes": [20, 40]}, "prefixes are for activations that need k, not for 'relu'; set prefixes = false"),
        ({"activation": "topk", "k": 4, "prefixes": [20, 30]}, r"prefixes \[20, 30\] must rise to d_sae 40; order them"),
        ({"activation": "topk", "k": 4, "prefixes": [20, 10, 40]}, r"prefixes \[20, 10, 40\] must rise to d_sae 40; order"),
        ({"activation": "topk", "k": 41}, "k 41 is more than the 40 latents; lower it"),
        (
            {"activation": "batchtopk", "k": 4, "match_l0": "full"},
            "match_l0 searches l1, and activation 'batchtopk' fixes L0",
        ),
    ],
)
def test_what_k_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    own = {"one": ArmConfig.model_validate({"question": "?"} | changes)}
    with pytest.raises(BadInputError, match=message):
        _ = Recipes(TrainConfig.model_validate(CONFIG_OF | {"resets": None}), own)["one"]


def test_a_recipe_with_prefixes_is_hashable_and_hashed_into_the_key() -> None:
    """TOML gives a list, and the planning of a study keeps recipes in dictionaries."""
    one, other = (
        TrainConfig.model_validate(CONFIG_OF | {"resets": None, "activation": "topk", "k": 4, "prefixes": prefixes})
        for prefixes in ([10, 40], [20, 40])
    )
    assert len({one, other}) == 2
    assert one.model_dump(mode="json")["prefixes"] == [10, 40]


def test_an_arm_removes_k_and_prefixes_of_the_arm_it_changes() -> None:
    full = TrainConfig.model_validate(CONFIG_OF | {"resets": None, "activation": "topk", "k": 4, "prefixes": [10, 40]})
    own = {"one": ArmConfig.model_validate({"question": "?", "activation": "relu", "k": False, "prefixes": False})}
    recipe = Recipes(full, own)["one"]
    assert (recipe.activation, recipe.k, recipe.prefixes) == ("relu", None, None)
