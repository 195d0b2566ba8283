"""Controls whose decoder or encoder does not train."""

import pytest
import torch

from pipeline.errors import BadInputError
from pipeline.study.arms import Recipes
from pipeline.study.recipe import ArmConfig, TrainConfig
from pipeline.train.frozen import NEAR
from pipeline.train.step import Trainer

FULL = TrainConfig(d_sae=24, steps=200, batch_size=32, lr_warmup=2, l1_warmup=2, learning_rate=1e-1, resets=None)


def trained(arm: str) -> tuple[Trainer, Trainer]:
    """As drawn, and after training."""
    recipe = Recipes(FULL)[arm]
    start, trainer = (Trainer(config=recipe, d_in=8, seed=0) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        trainer.step(torch.randn(32, 8, generator=generator) / 8**0.5)
    return start, trainer


def cosines(start: Trainer, trainer: Trainer) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(start.weights.W_dec_FD, trainer.weights.W_dec_FD, dim=1)


def test_what_is_frozen_stays_and_the_rest_trains() -> None:
    for arm, still, moves in (
        ("frozen-decoder", "W_dec_FD", "W_enc_DF"),
        ("frozen-encoder", "W_enc_DF", "W_dec_FD"),
        ("random", "W_enc_DF", "b_dec_D"),
        ("random", "W_dec_FD", "b_dec_D"),
    ):
        start, trainer = trained(arm)
        torch.testing.assert_close(getattr(trainer.weights, still), getattr(start.weights, still), rtol=0, atol=1e-6)
        assert float((getattr(trainer.weights, moves) - getattr(start.weights, moves)).abs().max()) > 0.1
        assert float(trainer.weights.b_enc_F.abs().max()) > 0.01


def test_a_softly_frozen_decoder_stays_near_its_start() -> None:
    free = cosines(*trained("baseline"))
    assert float(free.min()) < NEAR - 0.1  # otherwise nothing would be held back
    near = cosines(*trained("soft-frozen-decoder"))
    assert float(near.min()) >= NEAR - 1e-5
    assert int((near < NEAR + 1e-4).sum()) >= 3
    torch.testing.assert_close(trained("soft-frozen-decoder")[1].weights.W_dec_FD.norm(dim=1), torch.ones(24))


def test_it_resumes_near_the_same_start() -> None:
    _, first = trained("soft-frozen-decoder")
    resumed = Trainer(config=first.config, d_in=8, seed=7)
    resumed.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    x_BD = torch.randn(32, 8, generator=torch.Generator().manual_seed(1)) / 8**0.5
    first.step(x_BD)
    resumed.step(x_BD)
    assert torch.equal(first.weights.W_dec_FD, resumed.weights.W_dec_FD)


def test_a_frozen_decoder_is_not_reset() -> None:
    own = {"one": ArmConfig.model_validate({"question": "?", "frozen": "decoder"})}
    full = FULL.model_validate(FULL.model_dump() | {"resets": {"every": 10, "first": 20}})
    with pytest.raises(BadInputError, match="resets would move what frozen 'decoder' keeps; set resets = false"):
        _ = Recipes(full, own)["one"]
