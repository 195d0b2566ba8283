"""Pairs of latents that interfere in an arm's control, followed into the arm: the choice, the file, and the page."""

import itertools
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_study import SMALL, Study

from pipeline.artefacts.workspace import Workspace
from pipeline.evaluate import pairs as pairs_module
from pipeline.evaluate import separated
from pipeline.evaluate.bench import LayerBench
from pipeline.evaluate.evaluation import evaluate, unmeasured
from pipeline.evaluate.separated import IN_PLACE, LEFT, SHOWN, follow, interfering, pairs_in
from pipeline.evaluate.sparse import SparseLatents
from pipeline.report.collect import collect
from pipeline.report.latents import SeparatedOf
from pipeline.report.page import environment, write_report
from pipeline.report.results import Results
from pipeline.report.separated_pairs import separated_pairs
from pipeline.report.tables import Cell
from pipeline.sae.finished import open_sae
from pipeline.sae.sae import SAE
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan
from pipeline.train.training import train

ARMS = '["baseline", "full", "magnitude", "no-contrast", "other-order"]'


def random_sae(seed: int, latents: int) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(latents, 4, generator=generator), dim=1)
    return SAE(W_enc_DF=W_dec_FD.T, b_enc_F=torch.full((latents,), -0.3), W_dec_FD=W_dec_FD, b_dec_D=torch.zeros(4))


def chunks_of(f_BF: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(torch.split(f_BF, 7))


@given(st.integers(0, 2**31), st.integers(4, 14), st.integers(1, 6), st.sampled_from([64, 2**26]))
def test_choice_and_measures_against_sums_written_out(seed: int, latents: int, joint: int, size: int) -> None:
    control, arm = random_sae(seed, latents), random_sae(seed + 1, latents)
    x_BD = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed))
    values = {"control": control.encode(x_BD).double(), "arm": arm.encode(x_BD).double()}
    cosine = {name: (sae.W_dec_FD @ sae.W_dec_FD.T).double() for name, sae in (("control", control), ("arm", arm))}

    def interference(name: str, i: int, j: int) -> float:
        f = values[name]
        return float(cosine[name][i, j] * (f[:, i] * f[:, j]).sum())

    def together(i: int, j: int) -> int:
        return int(((values["control"][:, i] > 0) & (values["control"][:, j] > 0)).sum())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs_module, "BLOCK_BYTES", size)
        patch.setattr(separated, "PAIRS", 5)
        some = [SparseLatents.of(f) for f in chunks_of(control.encode(x_BD))]
        pair_P2 = interfering(control, lambda: some, joint)
    every = [pair for pair in itertools.combinations(range(latents), 2) if together(*pair) >= joint]
    naive = sorted((interference("control", *pair) for pair in every if interference("control", *pair) > 0), reverse=True)
    chosen: list[tuple[int, int]] = [(i, j) for i, j in pair_P2.tolist()]
    assert [interference("control", *pair) for pair in chosen] == pytest.approx(naive[:5], rel=1e-3)
    assert len(set(chosen)) == len(chosen)
    assert all(pair in every for pair in chosen)

    norm = torch.tensor(3.0, dtype=torch.float64)
    before, after = (pairs_in(sae, chunks_of(sae.encode(x_BD)), pair_P2, norm) for sae in (control, arm))
    for place, pair in enumerate(chosen):
        assert int(before.joint_P[place]) == together(*pair)
        for name, found in (("control", before), ("arm", after)):
            expected = 2 * interference(name, *pair) / 3
            assert float(found.interference_P[place]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    live = [place % 3 > 0 for place in range(len(chosen))]
    followed = follow(before, after, torch.tensor(live, dtype=torch.bool))
    kept = [(float(a), float(b)) for a, b in zip(after.interference_P, before.interference_P, strict=True)]
    gone = [place for place, (a, b) in enumerate(kept) if live[place] and a < LEFT * b]
    assert followed.separated_P.nonzero().squeeze(1).tolist() == gone
    assert int(followed.lost_P.sum()) == live.count(False)
    assert followed.most == sorted(gone, key=lambda place: kept[place][0] - kept[place][1])[:SHOWN]
    turned = [[float(control.W_dec_FD[latent] @ arm.W_dec_FD[latent]) for latent in pair] for pair in chosen]
    assert followed.in_place_P.nonzero().squeeze(1).tolist() == [p for p in gone if min(turned[p]) >= IN_PLACE]


def test_an_sae_whose_numbers_are_none_has_no_pairs() -> None:
    sae = random_sae(0, 6)
    f_BF = torch.full((20, 6), torch.nan)
    assert interfering(sae, lambda: [SparseLatents.of(f_BF)], 1).shape == (0, 2)


@pytest.fixture(scope="module")
def followed(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The small study with a control of `full` and a placebo. Its SAEs part little: pairs count that fall at all."""
    folder = tmp_path_factory.mktemp("followed")
    (folder / "small.toml").write_text(SMALL.replace('["baseline", "full", "magnitude"]', ARMS))
    experiment = Experiment.load(str(folder / "small.toml"))
    plan, workspace = make_plan(experiment), Workspace(shutil.copytree(study.workspace.local, folder / "workspace"))
    # Without the control nothing can be told, and nothing is missing.
    assert unmeasured(make_plan(experiment, arms=["full"]), workspace) == []
    before = {path.parent: path.read_bytes() for path in (workspace.local / "evaluations").glob("*/manifest.json")}
    train(plan, workspace)
    plan = make_plan(experiment, arms=["baseline", "full", "magnitude", "other-order"])  # of the control, the SAE is enough
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(separated, "LEFT", 1.0)
        assert evaluate(plan, workspace).failed == {}
    assert unmeasured(plan, workspace) == []
    # What was evaluated before is as it was.
    assert before == {folder: (folder / "manifest.json").read_bytes() for folder in before}
    return Study(experiment, plan, workspace)


def file_of(study: Study, arm: str) -> dict[str, Any]:
    (sae,) = [sae for sae in study.plan.saes if sae.arm == arm]
    return json.loads(study.workspace.verified(sae.apart["separated"], "separated.json").read_text())


def test_arms_with_a_penalty_and_the_placebo_have_it(followed: Study) -> None:
    assert {sae.arm: sae.control.arm for sae in followed.plan.saes if sae.control} == {
        "full": "no-contrast", "magnitude": "no-contrast", "other-order": "baseline"
    }  # fmt: skip
    assert all(("separated" in sae.apart) == (sae.control is not None) for sae in followed.plan.saes)


@pytest.mark.parametrize("arm", ["full", "other-order"])
def test_the_file_says_what_the_weights_and_the_held_out_rows_say(followed: Study, arm: str) -> None:
    found = file_of(followed, arm)
    (planned,) = [sae for sae in followed.plan.saes if sae.arm == arm]
    assert planned.control
    x_RD = torch.cat(list(LayerBench(followed.plan, 2, followed.workspace).rows))
    saes = [open_sae(artefact, followed.workspace) for artefact in (planned.control.artefact, planned.artefact)]
    latents = [sae.encode(x_RD) for sae in saes]
    norms = [float((sae.decode(f) - sae.b_dec_D).double().square().sum()) for sae, f in zip(saes, latents, strict=True)]
    assert found["reason"] is None
    assert found["control"] == planned.control.arm
    assert 0 < found["separated"] <= found["pairs"] - found["lost"]
    assert found["in_place"] <= found["separated"]
    assert len(found["shown"]) == min(SHOWN, found["separated"])
    for shown in found["shown"]:
        i, j = shown["latents"]
        for side, (sae, f_RF, norm) in enumerate(zip(saes, latents, norms, strict=True)):
            product_R = f_RF[:, i] * f_RF[:, j]
            assert shown["joint"][side] == int((product_R > 0).sum())
            assert shown["cosine"][side] == pytest.approx(float(sae.W_dec_FD[i] @ sae.W_dec_FD[j]), abs=1e-5)
            assert shown["co_activation"][side] == pytest.approx(2 * float(product_R.sum()) / norm, rel=1e-3, abs=1e-9)
        whole, left = (cosine * shared for cosine, shared in zip(shown["cosine"], shown["co_activation"], strict=True))
        assert left < whole
        assert shown["together"][0]["strength"] == pytest.approx(float((latents[0][:, i] * latents[0][:, j]).max()))
        assert [texts[0]["strength"] for texts in shown["alone"]] == pytest.approx(
            [float(latents[1][:, latent].max()) for latent in (i, j)]
        )


def test_the_page_shows_them_and_the_placebo_and_escapes_their_texts(followed: Study, tmp_path: Path) -> None:
    results = collect(followed.plan, followed.workspace)
    assert [(one.arm, one.placebo) for one in results.separated] == [
        ("full", False), ("magnitude", False), ("other-order", True)
    ]  # fmt: skip
    full, _, placebo = results.separated
    pair = full.shown[0]
    text = pair.together[0].model_copy(update={"before": "<b>bold", "token": "<script>", "after": "&amp"})
    changed = full.model_copy(update={"shown": (pair.model_copy(update={"together": (text,)}), *full.shown[1:])})
    results = results.model_copy(update={"separated": (changed, *results.separated[1:])})
    page = Path(write_report(results, tmp_path)).read_text()
    assert Results.model_validate_json((tmp_path / "results.json").read_text()).separated == results.separated
    shown = page[page.index('id="separated-2"') : page.index("<h3>Latents of ")]
    assert "&lt;b&gt;bold</bdi><mark>&lt;script&gt;</mark><bdi>&amp;amp" in shown
    assert "<script>" not in shown
    assert [re.sub("<.*?>", "", title) for title in re.findall(r"<h4>(.*?)</h4>", shown)] == [
        f"{one.arm} beside {one.control}, seed 0: {one.separated} of {one.pairs} pairs separated"
        for one in (results.separated[number] for number in (0, 2, 1))
    ]
    assert "Drift separates pairs, too.</strong>\nother-order has no penalty" in shown
    row = re.search(r"other-order</span>.*?</tr>", shown, re.DOTALL)
    assert row
    counts = [placebo.separated, placebo.in_place, placebo.lost]
    assert re.findall(r"<td>(.*?)</td>", row[0])[:3] == [f"{100 * count / placebo.pairs:.0f}%" for count in counts]
    assert shown.count("<details") == sum(len(one.shown) for one in results.separated) + 1  # and the other arms'


def part_of(results: Results, separated: Sequence[SeparatedOf]) -> str:
    """This part of the page, alone."""
    found = separated_pairs(results.model_copy(update={"separated": tuple(separated)}), 2)
    layer = {"layer": 2, "separated": found}
    return environment().get_template("separated.html.j2").render(part=layer, seeds=results.seeds, kinds={})


def test_it_says_where_nothing_is_separated_and_where_there_is_no_text(followed: Study) -> None:
    results = collect(followed.plan, followed.workspace)
    full, magnitude, placebo = results.separated
    none = magnitude.model_copy(update={"pairs": 0, "separated": 0, "shown": (), "reason": "no two latents fire together"})
    bare = tuple(pair.model_copy(update={"together": (), "alone": ((), ())}) for pair in placebo.shown)
    changed = [full.model_copy(update={"separated": 0, "shown": ()}), none, placebo.model_copy(update={"shown": bare})]
    text = part_of(results, changed)
    assert "None is separated, so there is none to show." in text
    assert 'colspan="4">no two latents fire together</td>' in text
    assert "without texts, which this model does not read" in text
    assert "<details" not in text
    assert text.count('<p class="latent">') == len(bare)
    assert "No arm of this study shows how many (the placebo, other-order, would)" in part_of(results, [full])
    assert separated_pairs(results.model_copy(update={"separated": ()}), 2) is None


def test_pairs_are_shown_of_one_seed_and_shares_are_means_over_all(followed: Study) -> None:
    results = collect(followed.plan, followed.workspace)
    full = results.separated[0].model_copy(update={"pairs": 100, "separated": 40})
    other = full.model_copy(update={"seed": 1, "separated": 50, "shown": ()})
    found = separated_pairs(results.model_copy(update={"separated": (full, other)}), 2)
    assert found
    assert found.lines[0].cells[0] == Cell("45%", "±5%")
    assert [(one.seed, len(one.shown)) for one in found.shown] == [(0, len(full.shown))]
