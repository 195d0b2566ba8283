"""The penalties of C2R and OrtSAE against their formulas, written down once more with all cosines at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInputError
from pipeline.runtime.linalg import vector_norm
from pipeline.study.arms import Recipes
from pipeline.study.penalties import C2R, Orthogonality
from pipeline.study.recipe import ArmConfig, TrainConfig
from pipeline.train.nearest import C2RTerm, NearestTerm, OrthogonalityTerm
from pipeline.train.penalty import Accumulator, Latents
from pipeline.train.step import Trainer
from pipeline.train.weights import Weights

CONFIG = TrainConfig(d_sae=24, steps=20, batch_size=16, lr_warmup=2, l1_warmup=2, resets=None)


def random_weights(d_in: int, d_sae: int, generator: torch.Generator) -> Weights:
    W_dec_FD = torch.randn(d_sae, d_in, generator=generator, dtype=torch.float64)
    return Weights(
        W_enc_DF=W_dec_FD.T.contiguous(),
        b_enc_F=torch.zeros(d_sae, dtype=torch.float64),
        W_dec_FD=W_dec_FD,
        b_dec_D=torch.zeros(d_in, dtype=torch.float64),
    )


def stated(term: NearestTerm, f_BF: torch.Tensor, W_dec_FD: torch.Tensor) -> torch.Tensor:
    """The formulas of the papers: one term per latent, from the matrix of cosines."""
    norm_F = vector_norm(W_dec_FD, dim=1)
    cosine_FF = (W_dec_FD / norm_F[:, None]) @ (W_dec_FD / norm_F[:, None]).T
    strength_F = (f_BF * norm_F).square().sum(dim=0).sqrt()
    means: list[torch.Tensor] = []
    total = torch.zeros((), dtype=torch.float64)
    for chunk in term.latents:
        squares: list[torch.Tensor] = []
        for i in chunk.tolist():
            others = [j for j in chunk.tolist() if j != i]
            j = others[int(cosine_FF.detach()[i, others].argmax())]
            squares.append(torch.relu(cosine_FF[i, j]).square())
            if isinstance(term.section, C2R):
                total = total + squares[-1] * (strength_F[i] + strength_F[j]) ** term.section.alpha
        means.append(torch.stack(squares).mean())
    return total / len(W_dec_FD) if isinstance(term.section, C2R) else torch.stack(means).mean()


@given(st.integers(0, 2**31), st.sampled_from([3, 5, 64]), st.sampled_from([0.5, 1.0, 2.0]))
def test_a_rivals_penalty_is_that_of_its_paper(seed: int, chunk: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(4, 11, generator)
    f_BF = torch.randn(6, 11, generator=generator, dtype=torch.float64).relu() + 0.01
    for term in (
        C2RTerm(C2R(kind="c2r", coefficient=1.0, chunk=chunk, alpha=alpha), weights),
        OrthogonalityTerm(Orthogonality(kind="orthogonality", coefficient=1.0, chunk=chunk), weights),
    ):
        term.prepare(0)
        f, W = f_BF.clone().requires_grad_(), weights.W_dec_FD.clone().requires_grad_()
        expected = stated(term, f, W)
        f_gradient, W_gradient = torch.autograd.grad(expected, (f, W), materialize_grads=True)
        into = Accumulator(f_BF=torch.zeros_like(f_BF), W_dec_FD=torch.zeros_like(weights.W_dec_FD), weight=3.0)
        norm_F = vector_norm(weights.W_dec_FD, dim=1)
        penalty = term.add_gradient(Latents(f_BF=f_BF, W_dec_FD=weights.W_dec_FD, norm_F=norm_F), into)
        torch.testing.assert_close(penalty, expected.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(into.f_BF, 3 * f_gradient, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(into.W_dec_FD, 3 * W_gradient, rtol=1e-9, atol=1e-12)


def test_silent_latents_give_finite_gradients() -> None:
    weights = random_weights(4, 11, torch.Generator().manual_seed(0))
    term = C2RTerm(C2R(kind="c2r", coefficient=1.0, alpha=0.5), weights)
    term.prepare(0)
    into = Accumulator(f_BF=torch.zeros(6, 11).double(), W_dec_FD=torch.zeros(11, 4).double(), weight=1.0)
    term.add_gradient(
        Latents(f_BF=into.f_BF.clone(), W_dec_FD=weights.W_dec_FD, norm_F=vector_norm(weights.W_dec_FD, dim=1)), into
    )
    assert into.f_BF.isfinite().all()
    assert into.W_dec_FD.isfinite().all()


def rival(penalty: dict[str, object]) -> TrainConfig:
    own = ArmConfig.model_validate({"question": "?", "from": "full", "contrast": False, "penalty": penalty})
    return Recipes(CONFIG, {"rival": own})["rival"]


@pytest.mark.parametrize("kind", ["c2r", "orthogonality"])
def test_a_training_with_random_chunks_resumes_with_the_same_ones(kind: str) -> None:
    recipe = rival({"kind": kind, "coefficient": 1.0, "chunk": 5, "every": 2})
    batches = [torch.randn(16, 8, generator=torch.Generator().manual_seed(step)) / 8**0.5 for step in range(12)]
    whole, first = (Trainer(config=recipe, d_in=8, seed=0) for _ in range(2))
    for x_BD in batches:
        whole.step(x_BD)
    for x_BD in batches[:6]:
        first.step(x_BD)
    resumed = Trainer(config=recipe, d_in=8, seed=5)
    resumed.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    for x_BD in batches[6:]:
        resumed.step(x_BD)
    for one, other in zip(whole.weights.tensors(), resumed.weights.tensors(), strict=True):
        assert torch.equal(one, other)


def test_settings_that_mean_nothing_are_refused() -> None:
    for wrong in ({"chunk": 1}, {"alpha": -1.0}, {"coefficient": 0.0}, {"kind": "c3r"}):
        with pytest.raises(BadInputError, match=next(iter(wrong))):
            rival({"kind": "c2r", "coefficient": 1.0} | wrong)
