"""JumpReLU beside the trainers of `dictionary_learning` and SAELens, and L0 that training steers to."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import BadInputError
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.sae.formats import write_sae
from pipeline.sae.jumprelu import JumpReLU
from pipeline.study.arms import Recipes
from pipeline.study.recipe import ArmConfig, TrainConfig
from pipeline.train import losses
from pipeline.train.steering import EVERY, Steering
from pipeline.train.step import Trainer

D_IN, D_SAE, ROWS = 16, 48, 64
CONFIG = {"d_sae": D_SAE, "steps": 60, "batch_size": ROWS, "contrast": None, "resets": None, "lr_warmup": 5, "l1_warmup": 5}


def batches(count: int, seed: int = 3) -> list[torch.Tensor]:
    """Rows with E||x||^2 = 1: sums of few of 24 directions, and noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(24, D_IN, generator=generator), dim=1)
    made: list[torch.Tensor] = []
    for _ in range(count):
        x_BD = (torch.rand(ROWS, 24, generator=generator) < 0.15).float() @ directions
        x_BD += 0.05 * torch.randn(ROWS, D_IN, generator=generator)
        made.append(x_BD / x_BD.square().sum(dim=1).mean().sqrt())
    return made


def trainer(**changes: Any) -> Trainer:
    config = TrainConfig.model_validate(CONFIG | {"activation": "jumprelu"} | changes)
    return Trainer(config=config, d_in=D_IN, seed=0)


def thresholds(one: Trainer) -> torch.Tensor:
    assert one.weights.threshold_F is not None
    return one.weights.threshold_F


def test_fifty_steps_are_those_of_dictionary_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quadratic, as there. Five things of theirs are not ours.

    They do not subtract b_dec before the encoder (held at 0 here), Adam has no first moment, long gradients are cut,
    thresholds may fall below 0 (here they begin far above), and L0 is counted on latents after the jump, so that only those
    above a threshold move it, not those just below: here it counts on pre-activations, as in the paper and in SAELens.
    """
    monkeypatch.setitem(sys.modules, "nnsight", types.SimpleNamespace(LanguageModel=object))
    pytest.importorskip("dictionary_learning", reason="dictionary-learning is not installed (extra `bench`)")
    from dictionary_learning.trainers import jumprelu

    counted, step_function, jump_function = types.SimpleNamespace(), jumprelu.StepFunction, jumprelu.JumpReLUFunction

    def jump(pre_BF: torch.Tensor, *others: Any) -> Any:
        counted.pre_BF = pre_BF
        return jump_function.apply(pre_BF, *others)

    counted.apply = lambda _, *others: step_function.apply(counted.pre_BF, *others)
    monkeypatch.setattr(jumprelu, "JumpReLUFunction", types.SimpleNamespace(apply=jump))
    monkeypatch.setattr(jumprelu, "StepFunction", counted)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    options = {"steps": 60, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 0, "lm_name": "", "device": "cpu"}
    theirs: Any = jumprelu.JumpReluTrainer(
        **options, lr=1e-3, bandwidth=0.05, sparsity_penalty=0.3, warmup_steps=5, sparsity_warmup_steps=5, decay_start=48,
        target_l0=6.0,
    )  # fmt: skip
    theirs.optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    ours = trainer(
        jumprelu={"sparsity": "quadratic", "bandwidth": 0.05, "threshold": 0.1}, l0_target=6.0, l1=0.3, learning_rate=1e-3,
        decoder_norm="unit",
    )  # fmt: skip
    ours.weights.b_enc_F[: D_SAE // 2] = -0.05
    pairs = {
        "W_enc": ours.weights.W_enc_DF, "b_enc": ours.weights.b_enc_F, "W_dec": ours.weights.W_dec_FD,
        "threshold": thresholds(ours),
    }  # fmt: skip
    for name, same in pairs.items():
        getattr(theirs.ae, name).data.copy_(same)
    before = {name: same.clone() for name, same in pairs.items()}
    for step, x_BD in enumerate(batches(50)):
        ours.step(x_BD)
        theirs.update(step, x_BD)
        ours.weights.b_dec_D.zero_()
        theirs.ae.b_dec.data.zero_()
    for name, same in pairs.items():
        assert float((same - before[name]).abs().max()) > 1e-2, name
        torch.testing.assert_close(same, getattr(theirs.ae, name).detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["step", "tanh", "quadratic"])
def test_loss_and_gradient_are_those_of_saelens(mode: str) -> None:
    """Its quadratic term is 2 t times ours, and averages over rows after the square instead of before."""
    with importing_sae_bench():
        from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
        from sae_lens.saes.sae import TrainStepInput

    ours = trainer(
        jumprelu={"sparsity": mode, "bandwidth": 0.05, "threshold": 0.1}, l0_target=6.0, l1=0.3, l1_warmup=0, lr_warmup=0
    )
    config = JumpReLUTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, decoder_init_norm=1.0, jumprelu_bandwidth=0.05, jumprelu_init_threshold=0.1,
        jumprelu_sparsity_loss_mode=mode, l0_coefficient=0.3, target_l0=6.0,
    )  # fmt: skip
    theirs = JumpReLUTrainingSAE(config)
    (x_BD,) = batches(1)
    if mode == "quadratic":
        x_BD = x_BD[:1]  # one row, so that both averages are the same
    pairs = dict(ours.weights.named())
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        ours.weights.b_dec_D.normal_(std=0.1)
        ours.weights.W_enc_DF.mul_(8)
        for name, same in pairs.items():
            parameters[name.rpartition("_")[0]].copy_(same)
    coefficient = 0.3 / (2 * 6.0) if mode == "quadratic" else 0.3
    step = TrainStepInput(
        sae_in=x_BD, coefficients={"l0": coefficient}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )
    loss = theirs.training_forward_pass(step).loss
    loss.backward()
    found = losses.differentiated(ours.weights, x_BD, ours._objective())
    weight = ours._objective().l1
    total = found.terms["reconstruction"] + weight * found.terms["sparsity"]
    torch.testing.assert_close(total, loss.detach(), rtol=1e-5, atol=0)
    for name, gradient in found.gradient.named():
        theirs_gradient = parameters[name.rpartition("_")[0]].grad
        assert theirs_gradient is not None
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, theirs_gradient, rtol=1e-5, atol=1e-6)
    assert weight == pytest.approx(0.3)


def test_thresholds_are_learned_kept_above_zero_and_finished_with_the_sae() -> None:
    made = trainer(l1=0.01, learning_rate=1e-2, jumprelu={"threshold": 0.01, "bandwidth": 0.05})
    stream = batches(60)
    for x_BD in stream:
        made.step(x_BD)
    assert float(thresholds(made).min()) >= 0
    assert float(thresholds(made).std()) > 1e-3
    x_BD, weights = stream[0], made.weights
    pre_BF = (x_BD - weights.b_dec_D) @ weights.W_enc_DF + weights.b_enc_F
    norm_F = weights.W_dec_FD.norm(dim=1)
    expected_BF = pre_BF * (pre_BF > thresholds(made)) * norm_F / 0.5
    finished = made.finished(0.5)
    assert isinstance(finished.activation, JumpReLU)
    torch.testing.assert_close(finished.encode(x_BD / 0.5), expected_BF, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoder_norm", ["free", "unit"])
def test_saelens_encodes_as_the_finished_sae_does(decoder_norm: str, tmp_path: Path) -> None:
    with importing_sae_bench():
        import sae_lens
    made = trainer(l1=0.01, learning_rate=1e-2, decoder_norm=decoder_norm, jumprelu={"threshold": 0.01, "bandwidth": 0.05})
    stream = batches(60)
    for x_BD in stream:
        made.step(x_BD)
    finished = made.finished(0.25)
    write_sae(finished, tmp_path, {})
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    assert theirs.cfg.architecture() == "jumprelu"
    x_BD = stream[0] / 0.25
    f_BF = finished.encode(x_BD)
    assert 0 < float((f_BF > 0).float().mean()) < 0.9
    torch.testing.assert_close(theirs.encode(x_BD), f_BF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.decode(f_BF), finished.decode(f_BF), rtol=1e-5, atol=1e-5)


def test_thresholds_survive_a_checkpoint_and_a_reset() -> None:
    changes = {"l1": 0.1, "learning_rate": 1e-2, "l0_target": 5.0, "steps": 200, "resets": {"first": 80, "every": 50}}
    straight = trainer(**changes)
    straight.weights.b_enc_F[:10] = -9  # dead
    stream = batches(200)
    for x_BD in stream[:110]:
        straight.step(x_BD)
    state = {name: tensor.clone() for name, tensor in straight.state().items()}
    resumed = trainer(**changes)
    resumed.load_state(state)
    for x_BD in stream[110:]:
        straight.step(x_BD)
        resumed.step(x_BD)
    assert straight.resets == resumed.resets > 0
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name


@pytest.mark.parametrize("l0", [0.0, 3.9, 4.1, 1e6])
def test_a_target_that_cannot_be_reached_leaves_the_weight_finite(l0: float) -> None:
    steering = Steering(4.0, torch.device("cpu"))
    for done in range(1, 100_000):
        steering.observe(torch.tensor(l0), done)
    assert 1e-9 < steering.factor < 1e9
    assert (steering.factor > 1) == (l0 > 4)


@pytest.mark.parametrize(
    ("changes", "within"),
    [
        ({"activation": "relu", "l1": 0.2}, 0.05),
        ({"activation": "relu", "l1": 0.01}, 0.05),
        ({"l1": 0.01, "jumprelu": {"bandwidth": 0.01, "threshold": 0.01}}, 0.15),
    ],
)
def test_training_steers_to_its_target(changes: dict[str, Any], within: float) -> None:
    steps = 40 * EVERY
    made = trainer(**{"steps": steps, "learning_rate": 3e-3, "l0_target": 4.0} | changes)
    last = [float(made.step(x_BD).l0) for x_BD in batches(steps)][-2 * EVERY :]
    assert sum(last) / len(last) == pytest.approx(4.0, rel=within)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "topk", "k": 4, "l0_target": 4}, "l0_target 4 steers l1, and activation 'topk' fixes L0 by k; set"),
        ({"l0_target": 50}, "l0_target 50 is more than the 48 latents; lower it"),
        ({"l0_target": 4, "match_l0": "full"}, "match_l0 'full' and l0_target 4 both decide L0; remove one"),
        ({"l0_target": 4, "l1": 0.0}, "l0_target 4 cannot be reached from l1 0; set l1 above 0"),
        (
            {"jumprelu": {"sparsity": "quadratic"}},
            'jumprelu.sparsity "quadratic" is the distance to l0_target; set l0_target',
        ),
        ({"activation": "relu", "jumprelu": {"bandwidth": 0.1}}, "jumprelu has options of another activation than"),
    ],
)
def test_what_cannot_be_steered_is_refused(changes: dict[str, Any], message: str) -> None:
    full = TrainConfig.model_validate(CONFIG | {"activation": "jumprelu"})
    own = {"one": ArmConfig.model_validate({"question": "?"} | changes)}
    with pytest.raises(BadInputError) as caught:
        _ = Recipes(full, own)["one"]
    assert message in str(caught.value)
