"""The search for a sparsity weight, as arithmetic and as training."""

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_study import SMALL, Study

from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError, CorruptArtefactError, InterruptedRunError, StorageError
from pipeline.sae.finished import open_sae
from pipeline.sae.formats import CONFIG, WEIGHTS
from pipeline.sae.sae import SAE
from pipeline.store.batches import rows_in_order, split_shards
from pipeline.store.reader import ActivationStore
from pipeline.study.experiment import Experiment
from pipeline.study.plan import TRAINING_LOG, Plan, make_plan
from pipeline.study.planned import TrainedSAE
from pipeline.study.recipe import TrainConfig
from pipeline.train import matching
from pipeline.train.log import Log
from pipeline.train.matching import FACTOR, MOST_TRIES, RECORD, TOLERANCE, TRIES, Try, distance, heldout_l0, next_l1
from pipeline.train.run import InTraining
from pipeline.train.step import StepMetrics, Trainer
from pipeline.train.training import cohorts, train

ARMS = 'arms = ["baseline", "full", "magnitude"]'


def searched(l0: Callable[[float], float], start: float, target: float) -> list[Try]:
    tries: list[Try] = []
    while (l1 := next_l1(tries, start, target)) is not None:
        tries.append(Try(l1=l1, l0=l0(l1)))
    return tries


@given(exponent=st.floats(0.1, 3), offset=st.floats(-3, 3), target=st.floats(0.5, 500), start=st.floats(1e-4, 10))
def test_any_power_law_is_matched_or_its_best_try_kept_in_few_tries(
    exponent: float, offset: float, target: float, start: float
) -> None:
    solution = start * 2**offset
    tries = searched(lambda l1: target * (l1 / solution) ** -exponent, start, target)
    assert tries[0].l1 == start
    # |offset| <= 3 is bracketed by the 5th try; then every one halves an octave.
    octaves = 2.0 ** -(MOST_TRIES - 5)
    assert min(distance(tried, target) for tried in tries) <= max(TOLERANCE, 2 ** (exponent * octaves) - 1)
    assert len(tries) == MOST_TRIES or distance(tries[-1], target) <= TOLERANCE
    assert len({tried.l1 for tried in tries}) == len(tries)


@given(
    levels=st.lists(st.floats(0, 1000), min_size=1, max_size=30).map(lambda levels: sorted(levels, reverse=True)),
    target=st.floats(0.1, 500),
)
def test_any_decreasing_function_ends_and_never_leaves_its_bracket(levels: list[float], target: float) -> None:
    def l0(l1: float) -> float:
        step = int(torch.tensor(l1).log2().item() + 15)
        return levels[min(max(step, 0), len(levels) - 1)]

    tries = searched(l0, 1.0, target)
    assert len(tries) <= MOST_TRIES
    assert all(distance(tried, target) > TOLERANCE for tried in tries[:-1])
    for index, tried in enumerate(tries):
        dense = [one.l1 for one in tries[:index] if l0(one.l1) > target]
        sparse = [one.l1 for one in tries[:index] if l0(one.l1) < target]
        if dense and sparse:
            assert max(dense) < tried.l1 < min(sparse)
        elif index:
            assert tried.l1 in (tries[index - 1].l1 * FACTOR, tries[index - 1].l1 / FACTOR)


def test_a_diverged_try_ends_the_search() -> None:
    assert next_l1([Try(l1=1, l0=30.0), Try(l1=2, l0=None)], 1.0, 10.0) is None


def test_l0_is_counted_on_the_first_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "HELDOUT_ROWS", 5)
    sae = SAE(W_enc_DF=torch.eye(3), b_enc_F=torch.zeros(3), W_dec_FD=torch.eye(3), b_dec_D=torch.zeros(3))
    off = SAE(W_enc_DF=torch.eye(3), b_enc_F=torch.full((3,), -9.0), W_dec_FD=torch.eye(3), b_dec_D=torch.zeros(3))
    rows_BD = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0], [-1, 1, 1], [1, 1, 1], [1, 1, 1]])
    assert heldout_l0([sae, off], rows_BD.split(3)) == [8 / 5, 0]


def matched_study(study: Study, folder: Path, arms: Sequence[str] = ("full", "l0-matched")) -> tuple[Plan, Workspace]:
    """The small study with other arms and two seeds, in a workspace of its own that has the same store."""
    folder.mkdir()
    toml = folder / "small.toml"
    toml.write_text(SMALL.replace(ARMS, f"arms = {json.dumps(arms)}").replace("seeds = [0]", "seeds = [0, 1]"))
    workspace = Workspace(folder / "workspace")
    workspace.local.mkdir()
    for kind in ("models", "stores", "probes"):
        (workspace.local / kind).symlink_to(study.workspace.local.resolve() / kind)
    return make_plan(Experiment.load(str(toml))), workspace


@pytest.fixture(scope="module")
def matched(study: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Workspace]:
    """A study with the arm `l0-matched`, trained. Read only."""
    plan, workspace = matched_study(study, tmp_path_factory.mktemp("matched") / "study")
    assert len(train(plan, workspace).made) == 4
    return plan, workspace


def results(plan: Plan, workspace: Workspace) -> dict[str, object]:
    """All that is published of the matched SAEs, but for times."""
    found: dict[str, object] = {}
    for sae in plan.saes:
        if sae.matched_to:
            folder = workspace.folder(sae.artefact)
            log = [json.loads(line) for line in (folder / TRAINING_LOG).read_text().splitlines()]
            record = json.loads((folder / RECORD).read_text())
            for timed in (*log, *record["tries"]):
                timed.pop("tokens_per_second", None)
                timed.pop("seconds", None)
            found[str(sae)] = ((folder / WEIGHTS).read_bytes(), (folder / CONFIG).read_bytes(), log, record)
    return found


def test_the_matched_arm_has_the_l0_of_its_reference(matched: tuple[Plan, Workspace]) -> None:
    plan, workspace = matched
    store = ActivationStore(workspace.storage(plan.store))
    _, heldout = split_shards(store, 1)
    for sae in plan.saes:
        if sae.matched_to is None:
            continue
        saes = [open_sae(artefact, workspace) for artefact in (sae.artefact, sae.matched_to.artefact)]
        l0, target = heldout_l0(saes, rows_in_order(store, sae.layer, heldout))
        manifest = workspace.manifest(sae.artefact)
        assert manifest is not None
        facts = manifest.facts["matching"]
        assert (facts["l0"], facts["target_l0"], facts["reference"]) == (l0, target, "full")
        assert abs(l0 / target - 1) <= TOLERANCE
        assert facts["within_tolerance"]
        assert facts["l1"] != sae.recipe.l1
        folder = workspace.folder(sae.artefact)
        assert json.loads((folder / CONFIG).read_text())["metadata"]["matching"] == facts
        tries = json.loads((folder / RECORD).read_text())["tries"]
        assert len(tries) == facts["tries"]
        assert {"l1": facts["l1"], "l0": l0}.items() <= tries[-1].items()
        assert not (folder / TRIES).exists()
        assert manifest.parents == {sae.matched_to.artefact.path: workspace.fingerprint(sae.matched_to.artefact.path)}


def test_the_order_of_the_arms_changes_nothing(study: Study, matched: tuple[Plan, Workspace], tmp_path: Path) -> None:
    plan, workspace = matched_study(study, tmp_path / "study", ["l0-matched", "full"])
    groups = cohorts(plan, workspace)
    assert [{sae.arm for sae in group} for group in groups] == [{"full"}, {"l0-matched"}]
    assert {sae.artefact.key for sae in plan.saes} == {sae.artefact.key for sae in matched[0].saes}
    train(plan, workspace)
    assert results(plan, workspace) == results(*matched)


@pytest.mark.parametrize("when", ["between rounds", "within a round"])
def test_an_interrupted_search_goes_on(
    study: Study, matched: tuple[Plan, Workspace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    plan, workspace = matched_study(study, tmp_path / "study")
    recorded, stepped = matching.Search.record, Trainer.step

    def interrupt(self: matching.Search, member: InTraining, l0: float | None) -> None:
        recorded(self, member, l0)
        if len(self.tries) == 2:  # the other seed of the round is not recorded
            raise KeyboardInterrupt

    def stop(self: Trainer, x_BD: torch.Tensor) -> StepMetrics:
        if self.done == 60 and self.config.l1 != plan.experiment.train.l1:
            signal.raise_signal(signal.SIGTERM)
        return stepped(self, x_BD)

    with monkeypatch.context() as patched:
        between = when == "between rounds"
        patched.setattr(*((matching.Search, "record", interrupt) if between else (Trainer, "step", stop)))
        with pytest.raises(KeyboardInterrupt if between else InterruptedRunError):
            train(plan, workspace)
    tries = [json.loads(path.read_text())["tries"] for path in workspace.local.glob(f"saes/*/{TRIES}/{RECORD}")]
    assert sorted(map(len, tries)) == ([1, 2] if between else [1, 1])
    assert not any(workspace.manifest(sae.artefact) for sae in plan.saes if sae.matched_to)
    assert len(train(plan, workspace).made) == 2
    assert results(plan, workspace) == results(*matched)


def kept_try(folder: Path) -> matching.Search:
    """A search with one recorded try; no training, so its files are made up."""
    one = new_search(folder)
    job = one.next_job()
    for name in (CONFIG, WEIGHTS, TRAINING_LOG):
        (job.folder / name).write_text(name)
    one.record(
        cast("InTraining", SimpleNamespace(job=job, seconds=1.0, stopped=None, trainer=SimpleNamespace(resets=0))), 9.0
    )
    return one


def new_search(folder: Path) -> matching.Search:
    recipe = TrainConfig(d_sae=8, steps=10, match_l0="full")
    sae = cast("TrainedSAE", SimpleNamespace(recipe=recipe))
    return matching.Search(sae=sae, folder=folder / TRIES, target=10.0, parents={})


def test_a_search_goes_on_after_its_last_try(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = kept_try(tmp_path)
    one.check_kept()
    assert new_search(tmp_path).tries == one.tries == [Try(l1=0.04, l0=9.0, seconds=1.0)]
    assert new_search(tmp_path).kept_files == one.kept_files
    assert new_search(tmp_path).outcome.keys() == {"target_l0", "tries"}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "damage",
    [
        lambda tries: (tries / "00" / WEIGHTS).write_text("other"),
        lambda tries: (tries / "00" / CONFIG).unlink(),
        lambda tries: (tries / "00" / TRAINING_LOG).write_text(""),
        lambda tries: (tries / RECORD).write_text("{"),
        lambda tries: (tries / RECORD).write_text("[]"),
        lambda tries: (tries / RECORD).write_bytes(b"\xff"),
        lambda tries: (tries / RECORD).write_text((tries / RECORD).read_text().replace('"l0": 9.0', '"l0": 9.9')),
        lambda tries: (tries / RECORD).write_text('{"target_l0": 10.0, "tries": [{"l1": 1, "l0": 2.0}]}'),  # of 0.5.0
    ],
)
def test_a_search_whose_work_was_damaged_begins_again_and_says_so(
    tmp_path: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    kept_try(tmp_path)
    damage(tmp_path / TRIES)
    again = new_search(tmp_path)
    assert (again.tries, again.kept_files, again.l1) == ([], {}, 0.04)
    told = capsys.readouterr().err
    assert told.startswith(f"{tmp_path / TRIES} is damaged; the search for ")
    assert told.endswith(" begins again\n")
    assert not (tmp_path / TRIES).exists()


def test_weights_that_change_before_they_are_published_are_not(tmp_path: Path) -> None:
    one = kept_try(tmp_path)
    (one.kept / WEIGHTS).write_text("other")
    with pytest.raises(CorruptArtefactError, match="was changed after it was made; run the same command again"):
        one.check_kept()


def test_no_try_is_made_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / TRIES).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInputError, match="tries is a link"):
        new_search(tmp_path)
    (tmp_path / TRIES).unlink()
    (tmp_path / TRIES).mkdir()
    (tmp_path / TRIES / "00").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInputError, match="00 is a link"):
        new_search(tmp_path).next_job()


def test_an_error_of_the_machine_ends_the_search_and_the_same_command_goes_on(
    study: Study, matched: tuple[Plan, Workspace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, workspace = matched_study(study, tmp_path / "study")
    write = Log.write

    def full_disk(self: Log, line: str) -> None:
        if self.path.parent.name == "01":
            raise StorageError(f"{self.path} cannot be written: No space left on device")
        write(self, line)

    with monkeypatch.context() as patched:
        patched.setattr(Log, "write", full_disk)
        with pytest.raises(StorageError, match="No space left on device"):
            train(plan, workspace)
    assert not any(workspace.manifest(sae.artefact) for sae in plan.saes if sae.matched_to)
    assert len(train(plan, workspace).made) == 2
    assert results(plan, workspace) == results(*matched)


def test_what_a_killed_run_left_beside_a_finished_sae_is_removed(matched: tuple[Plan, Workspace], tmp_path: Path) -> None:
    plan, original = matched
    shutil.copytree(original.local, tmp_path / "copy", symlinks=True)
    workspace = Workspace(tmp_path / "copy")
    before = sorted(workspace.local.rglob("*"))
    for sae in plan.saes:
        folder = workspace.folder(sae.artefact)
        for left in (
            "checkpoint/000000060.json",
            "checkpoint/.000000060.json.1.partial",
            "tries/00/x",
            ".cfg.json.1.partial",
        ):
            (folder / left).parent.mkdir(parents=True, exist_ok=True)
            (folder / left).write_text("left")
    assert train(plan, workspace).made == []
    assert [path for path in sorted(workspace.local.rglob("*")) if path not in before and ".locks" not in path.parts] == []


def test_what_cannot_be_matched_is_published_and_says_so(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matching, "MOST_TRIES", 1)
    plan, workspace = matched_study(study, tmp_path / "study")
    assert len(train(plan, workspace).made) == 4
    for sae in plan.saes:
        manifest = workspace.manifest(sae.artefact)
        assert manifest is not None
        if sae.matched_to:
            assert not manifest.facts["matching"]["within_tolerance"]
            assert manifest.facts["matching"]["tries"] == 1
    errors = capsys.readouterr().err
    assert "not matched within 2%: l0-matched seed 0 layer 2: L0 " in errors


def test_without_its_reference_it_is_not_made_and_with_another_made_again(
    matched: tuple[Plan, Workspace], tmp_path: Path
) -> None:
    plan, original = matched
    shutil.copytree(original.local, tmp_path / "copy", symlinks=True)
    workspace = Workspace(tmp_path / "copy")
    only = make_plan(plan.experiment, arms=["l0-matched"], seeds=[0])
    (sae,) = only.saes
    assert cohorts(only, workspace) == []
    assert sae.matched_to is not None
    shutil.rmtree(workspace.folder(sae.matched_to.artefact))
    result = train(only, workspace)
    assert result.failed == {str(sae): "it is matched to full seed 0 layer 2, which is not trained"}
    assert result.made == []
    made = train(plan, workspace).made
    assert [str(one) for one in made] == ["full seed 0 layer 2", str(sae)]
    assert results(plan, workspace) == results(plan, original)


def test_the_reference_s_recipe_is_part_of_the_identity(study: Study, tmp_path: Path) -> None:
    before, _ = matched_study(study, tmp_path / "before", ["baseline", "full", "l0-matched"])
    toml = tmp_path / "before" / "small.toml"
    toml.write_text(toml.read_text() + "\n[train.contrast]\ncoefficient = 0.3\n")
    after = make_plan(Experiment.load(str(toml)))
    same = {str(sae) for sae, now in zip(before.saes, after.saes, strict=True) if sae.artefact.key == now.artefact.key}
    assert {name.split()[0] for name in same} == {"baseline"}


@pytest.mark.parametrize(
    ("arms", "more", "message"),
    [
        (["baseline", "l0-matched"], "", "study.arms: 'l0-matched' is matched to 'full', which is not among them; add it"),
        (["full"], "[arms.mine]\nquestion = '?'\nmatch_l0 = 'fulll'", "unknown arm 'fulll'"),
        (["full"], "[arms.mine]\nquestion = '?'\nmatch_l0 = 'l0-matched'", "'l0-matched' is itself matched to another arm"),
        (["full"], "[arms.mine]\nquestion = '?'\nmatch_l0 = 'mine'", "'mine' is itself matched to another arm"),
        (
            ["full"],
            "[arms.mine]\nquestion = '?'\nmatch_l0 = 'full'\nl1 = 0.0",
            "search for match_l0 cannot begin at l1 0",
        ),
    ],
)
def test_a_match_that_cannot_be_is_refused(small_toml: Path, arms: list[str], more: str, message: str) -> None:
    small_toml.write_text(SMALL.replace(ARMS, f"arms = {json.dumps(arms)}") + more)
    with pytest.raises(BadInputError) as caught:
        Experiment.load(str(small_toml))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_recipe_itself_cannot_be_matched(small_toml: Path) -> None:
    small_toml.write_text(SMALL.replace("[train]", "[train]\nmatch_l0 = 'full'"))
    with pytest.raises(BadInputError, match=r"train\.match_l0: only an arm can be matched"):
        Experiment.load(str(small_toml))
