import io
import itertools
import json
from collections.abc import Iterator, Sequence

import pytest
import torch

from pipeline.errors import DivergedSAEError, PipelineError, StorageError
from pipeline.study.penalties import Contrast
from pipeline.study.recipe import Resets, TrainConfig
from pipeline.train.cohort import Member, train_cohort
from pipeline.train.resets import reset_dead, reset_due
from pipeline.train.step import StepMetrics, Trainer
from pipeline.train.weights import Weights

D_IN, D_SAE = 12, 20


def config(**changes: object) -> TrainConfig:
    values = {
        "d_sae": D_SAE,
        "steps": 60,
        "batch_size": 32,
        "learning_rate": 1e-2,
        "lr_warmup": 5,
        "l1_warmup": 5,
        "l1": 0.02,
    }
    values["resets"] = Resets(every=10, first=20)
    return TrainConfig.model_validate(values | changes)


VARIANTS = {
    "baseline": config(decoder_norm="unit", contrast=None, resets=None),
    "full": config(),
    "magnitude": config(contrast=Contrast(by="magnitude")),
    "unweighted": config(contrast=Contrast(weighted=False)),
}


def batches(seed: int = 0) -> Iterator[torch.Tensor]:
    """Rows made of few directions, scaled to E||x||^2 = 1."""
    generator = torch.Generator().manual_seed(seed)
    directions_GD = torch.nn.functional.normalize(torch.randn(8, D_IN, generator=generator), dim=1)
    while True:
        weights_BG = torch.rand(32, 8, generator=generator) * (torch.rand(32, 8, generator=generator) < 0.3)
        yield weights_BG @ directions_GD


def run(configs: dict[str, TrainConfig], seed: int = 0) -> dict[str, Member]:
    members = {
        name: Member(trainer=Trainer(config=recipe, d_in=D_IN, seed=seed), log=io.StringIO())
        for name, recipe in configs.items()
    }
    train_cohort(list(members.values()), batches(), 60, "test")
    return members


def tensors(member: Member) -> list[torch.Tensor]:
    return member.trainer.weights.tensors()


def test_a_cohort_is_its_members_alone_bit_for_bit() -> None:
    together = run(VARIANTS)
    for name, recipe in VARIANTS.items():
        alone = run({name: recipe})[name]
        for one, other in zip(tensors(together[name]), tensors(alone), strict=True):
            assert torch.equal(one, other), name


def test_every_arm_learns_and_no_two_are_the_same() -> None:
    members = run(VARIANTS)
    for member in members.values():
        records = [json.loads(line) for line in member.log.getvalue().splitlines()]
        assert [record["step"] for record in records] == [50, 60]
        assert records[-1]["tokens"] == 60 * 32
        assert records[-1]["fvu"] < 0.9
    for one, other in itertools.combinations(members.values(), 2):
        assert not torch.equal(one.trainer.weights.W_dec_FD, other.trainer.weights.W_dec_FD)


def test_unit_norm_holds_and_free_norms_move() -> None:
    members = run(VARIANTS)
    torch.testing.assert_close(members["baseline"].trainer.weights.W_dec_FD.norm(dim=1), torch.ones(D_SAE))
    assert not torch.allclose(members["full"].trainer.weights.W_dec_FD.norm(dim=1), torch.ones(D_SAE), atol=1e-3)


def test_seeds_differ_in_initialisation() -> None:
    one, other = (Trainer(config=config(), d_in=D_IN, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.weights.W_dec_FD, other.weights.W_dec_FD)
    torch.testing.assert_close(one.weights.W_dec_FD.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(one.weights.W_enc_DF, 0.1 * one.weights.W_dec_FD.T)


def test_the_first_step_moves_nothing_because_the_learning_rate_starts_at_zero() -> None:
    trainer = Trainer(config=config(), d_in=D_IN, seed=0)
    before = trainer.weights.W_dec_FD.clone()
    stream = batches()
    trainer.step(next(stream))
    assert torch.equal(trainer.weights.W_dec_FD, before)
    trainer.step(next(stream))
    assert not torch.equal(trainer.weights.W_dec_FD, before)


def test_folding_changes_nothing_but_the_units() -> None:
    trainer = run({"full": config()})["full"].trainer
    scale = 0.25
    x_BD = next(batches(1)) / scale
    sae = trainer.finished(scale)
    with torch.no_grad():
        scaled_BD = x_BD * scale
        f_BF = torch.relu((scaled_BD - trainer.weights.b_dec_D) @ trainer.weights.W_enc_DF + trainer.weights.b_enc_F)
        reconstructed_BD = (f_BF @ trainer.weights.W_dec_FD + trainer.weights.b_dec_D) / scale
    torch.testing.assert_close(sae.W_dec_FD.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(sae.encode(x_BD), f_BF * trainer.weights.W_dec_FD.detach().norm(dim=1) / scale)
    torch.testing.assert_close(sae.decode(sae.encode(x_BD)), reconstructed_BD)


def test_a_diverging_arm_stops_and_the_others_go_on() -> None:
    members = run({"bad": config(learning_rate=1e30, lr_warmup=0), "good": config()})
    assert members["bad"].stopped == "loss not finite at step 50, lower train.learning_rate"
    assert members["good"].stopped is None
    assert members["good"].trainer.done == 60


def without_memory(monkeypatch: pytest.MonkeyPatch, raises: str, error: Exception) -> None:
    """From step 8 on, this method of a Trainer with an l1 of 0.123 fails."""
    sound = getattr(Trainer, raises)

    def failing(self: Trainer, x_BD: torch.Tensor) -> object:
        if self.config.l1 == 0.123 and self.done >= 7:
            raise error
        return sound(self, x_BD)

    monkeypatch.setattr(Trainer, raises, failing)


def test_a_failure_of_its_own_stops_an_arm_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    without_memory(monkeypatch, "step", DivergedSAEError("loss not\nfinite"))
    members = run({"bad": config(l1=0.123), "good": config()})
    assert members["bad"].stopped == "loss not finite"
    assert (members["good"].stopped, members["good"].trainer.done) == (None, 60)


@pytest.mark.parametrize(("raises", "done"), [("step", 8), ("diagnose", 50)])
@pytest.mark.parametrize(
    ("error", "raised", "says"),
    [
        (MemoryError("no room\nfor this"), PipelineError, r"out of memory in step \d+: no room for this; free some"),
        (OSError(5, "Input/output error"), OSError, "Input/output error"),
        (StorageError("no space"), StorageError, "no space"),
        (ValueError("a fault in a penalty"), ValueError, "a fault in a penalty"),
    ],
)
def test_an_error_of_the_machine_is_no_failure_of_an_sae(
    raises: str, done: int, error: Exception, raised: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_memory(monkeypatch, raises, error)
    members = [
        Member(trainer=Trainer(config=recipe, d_in=D_IN, seed=0), log=io.StringIO())
        for recipe in (config(l1=0.123), config(), config(l1=0.1))
    ]
    saved: list[tuple[Member, int]] = []

    def save(some: Sequence[Member]) -> None:
        for member in some:
            if not saved:
                saved.append((member, 0))
                raise StorageError("this one cannot be saved")  # and hides neither the error nor the others
            saved.append((member, member.trainer.done))

    with pytest.raises(raised, match=says):
        train_cohort(members, batches(), 60, "test", save=save)
    assert [member.stopped for member in members] == [None] * 3
    assert saved == [(members[1], 0), (members[2], done)]  # the first is in the middle of a step, or lacks a record


def test_an_error_between_two_steps_costs_nobody_a_step() -> None:
    def broken() -> Iterator[torch.Tensor]:
        yield from itertools.islice(batches(), 55)
        raise OSError(5, "Input/output error")

    members = [Member(trainer=Trainer(config=config(), d_in=D_IN, seed=seed), log=io.StringIO()) for seed in (0, 1)]
    saved: list[int] = []
    with pytest.raises(OSError, match="Input/output error"):
        train_cohort(members, broken(), 60, "test", save=lambda some: saved.extend(one.trainer.done for one in some))
    assert saved == [55, 55]


def test_residuals_that_are_not_finite_are_a_failure_of_the_sae() -> None:
    residual_BD = torch.ones(6, D_IN)
    residual_BD[1, 1] = torch.inf
    with pytest.raises(DivergedSAEError, match=r"loss not finite at a reset of dead latents, lower train\.learning_rate"):
        reset(torch.ones(D_SAE, dtype=torch.bool), residual_BD)


def test_a_live_view_that_fails_costs_no_training(capsys: pytest.CaptureFixture[str]) -> None:
    class Away:
        def log(self, step: int, values: dict[str, float]) -> None:
            raise OSError(f"nobody is there at step {step}")

    trainer = Trainer(config=config(), d_in=D_IN, seed=0)
    member = Member(trainer=trainer, log=io.StringIO(), name="full seed 0 layer 2", tracker=Away())
    train_cohort([member], batches(), 60, "train")
    assert (member.stopped, trainer.done, member.tracker) == (None, 60, None)
    told = "full seed 0 layer 2 is no longer shown live: OSError: nobody is there at step 50\n"
    assert capsys.readouterr().err.count(told) == 1
    assert [json.loads(line)["step"] for line in member.log.getvalue().splitlines()] == [50, 60]


@pytest.mark.parametrize(
    ("done", "due"), [(10, False), (19, False), (20, True), (25, False), (30, True), (50, True), (60, False)]
)
def test_resets_come_after_their_warmup_and_not_at_the_end(done: int, due: bool) -> None:
    assert reset_due(done, config()) == due
    assert not reset_due(done, config(resets=None))


def reset(dead_F: torch.Tensor, residual_BD: torch.Tensor) -> tuple[torch.Tensor, Weights]:
    generator = torch.Generator().manual_seed(0)
    W_dec_FD = torch.randn(D_SAE, D_IN, generator=generator)
    weights = Weights(W_enc_DF=W_dec_FD.T.clone(), b_enc_F=torch.ones(D_SAE), W_dec_FD=W_dec_FD, b_dec_D=torch.zeros(D_IN))
    return reset_dead(weights, dead_F, residual_BD, generator), weights


def test_dead_latents_get_the_worst_residuals_and_small_encoders() -> None:
    residual_BD = torch.zeros(6, D_IN)
    residual_BD[2, 3], residual_BD[4, 5] = 2.0, -1.0
    dead_F = torch.zeros(D_SAE, dtype=torch.bool)
    dead_F[[1, 7]] = True
    indices, weights = reset(dead_F, residual_BD)
    assert indices.tolist() == [1, 7]
    expected = {tuple(torch.eye(D_IN)[3].tolist()), tuple((-torch.eye(D_IN)[5]).tolist())}
    assert {tuple(row) for row in weights.W_dec_FD[indices].tolist()} == expected
    alive_norm = weights.W_enc_DF[:, ~dead_F].norm(dim=0).mean()
    torch.testing.assert_close(weights.W_enc_DF[:, indices].norm(dim=0), (0.2 * alive_norm).expand(2))
    assert weights.b_enc_F[indices].tolist() == [0, 0]
    assert bool((weights.b_enc_F[~dead_F] == 1).all())


@pytest.mark.parametrize("rows", [4, 64])
def test_all_dead_is_no_special_case(rows: int) -> None:
    indices, weights = reset(torch.ones(D_SAE, dtype=torch.bool), torch.randn(rows, D_IN))
    assert len(indices) == min(rows, D_SAE)
    assert weights.W_enc_DF.isfinite().all()
    torch.testing.assert_close(weights.W_dec_FD[indices].norm(dim=1), torch.ones(len(indices)))
    if len(indices) == D_SAE:
        torch.testing.assert_close(weights.W_enc_DF.norm(dim=0), torch.full((D_SAE,), 0.02))


def test_nothing_dead_or_nothing_left_to_explain_resets_nothing() -> None:
    none_dead, all_dead = torch.zeros(D_SAE, dtype=torch.bool), torch.ones(D_SAE, dtype=torch.bool)
    assert len(reset(none_dead, torch.randn(8, D_IN))[0]) == 0
    assert len(reset(all_dead, torch.zeros(8, D_IN))[0]) == 0


def test_a_reset_latent_starts_with_clean_moments() -> None:
    # Nothing fires with so large a bias, so that every latent is dead when the first reset comes.
    trainer = Trainer(config=config(l1=0.0), d_in=D_IN, seed=0)
    with torch.no_grad():
        trainer.weights.b_enc_F.fill_(-100.0)
    stream = batches()
    for _ in range(20):
        trainer.step(next(stream))
    assert trainer.resets == D_SAE
    for moment in (trainer.first_moment, trainer.second_moment):
        assert not moment.W_enc_DF.any()
        assert not moment.b_enc_F.any()
        assert not moment.W_dec_FD.any()
    assert not trainer.dead(10).any()


def test_checkpoints_that_take_long_come_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    saved: list[int] = []

    def a_step_takes_a_second(self: Trainer, x_BD: torch.Tensor) -> StepMetrics:
        clock[0] += 1
        return step(self, x_BD)

    def save(members: Sequence[Member]) -> None:
        saved.append(members[0].trainer.done)
        clock[0] += 0.39

    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", a_step_takes_a_second)
    monkeypatch.setattr("pipeline.train.cohort.time.monotonic", lambda: clock[0])
    member = Member(trainer=Trainer(config=config(), d_in=D_IN, seed=0), log=io.StringIO())
    train_cohort([member], batches(), 60, "test", save=save, save_every=5)
    assert saved == [5, 25, 45]  # after 5 s, then after 0.39 / 2 % = 19.5
