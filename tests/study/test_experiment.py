import runpy
from pathlib import Path

import pytest

from pipeline.errors import BadInputError
from pipeline.study.arms import ARMS, Recipes
from pipeline.study.experiment import Experiment
from pipeline.study.penalties import Contrast
from pipeline.study.plan import make_plan
from pipeline.study.recipe import ArmConfig, TrainConfig

ROOT = Path(__file__).parents[2]
TABLE = [
    "baseline", "full", "magnitude", "no-contrast", "unweighted", "coef-0.05", "coef-0.2",
    "topk-0.05", "topk-0.2", "warmup-2000", "warmup-500",
]  # fmt: skip

PYTHON, HUB = 'source = "python"', 'source = "huggingface"'
TINY = 'source = "tiny"\nsteps = 150\nbatch_size = 8\nvocabulary = 512'
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", ["demo", "gemma-2-2b", "gemma-2b"])
def test_shipped_experiments_are_the_whole_study(name: str) -> None:
    experiment = Experiment.load(name)
    # And what its question takes: a control at equal L0, and one that differs by nothing but drift.
    assert list(experiment.study.arms) == [*TABLE, "no-contrast-l0", "other-order"]
    assert experiment.recipes.arms["no-contrast-l0"].against == "full"
    assert len(experiment.study.seeds) >= 2
    # Otherwise the arms that differ in their first reset could not differ.
    assert experiment.train.steps > 2500


def test_the_gemma_study_is_what_the_method_says() -> None:
    experiment = Experiment.load("gemma-2-2b")
    assert experiment.store.layers == (5, 12, 19)
    assert (experiment.train.d_sae, experiment.train.batch_size, experiment.train.learning_rate) == (2304, 2048, 3e-4)
    assert (experiment.train.l1, experiment.store.context, experiment.store.tokens) == (0.04, 128, 20_000_000)
    assert (experiment.probes.train_size, experiment.probes.test_size, experiment.probes.seed) == (4000, 1000, 42)
    assert len(experiment.probes.datasets) == 8
    heldout_rows = experiment.store.tokens - 580 * experiment.store.shard_rows
    assert experiment.train.heldout_shards == 611 - 580
    assert experiment.train.steps * experiment.train.batch_size <= experiment.store.tokens - heldout_rows


def test_arms_are_the_table_in_its_order() -> None:
    controls = ["frozen-decoder", "soft-frozen-decoder", "frozen-encoder", "random"]
    assert list(ARMS) == [
        *TABLE,
        "row",
        "mutual",
        "orthogonal",
        "unit-norm",
        *controls,
        "other-order",
        "l0-matched",
        "literal",
    ]
    assert [ARMS[name].run for name in TABLE] == list(range(11))
    assert all(arm.run is None for name, arm in ARMS.items() if name not in TABLE)


def test_the_table_in_the_documentation_is_up_to_date() -> None:
    page = (ROOT / "docs/method.md").read_text()
    assert runpy.run_path(str(ROOT / "docs/arm_table.py"))["rewritten"](page) == page
    assert all(f"| `{name}` |" in page for name in ARMS)


def test_each_arm_differs_from_full_in_what_it_says_and_nothing_else() -> None:
    full = Experiment.load("demo").train
    recipes = Recipes(full)
    assert recipes["full"] == full
    for name, arm in ARMS.items():
        changed = recipes[name].model_dump()
        expected = recipes[arm.base].model_dump()
        for path, value in arm.diff.items():
            section, _, field = path.rpartition(".")
            (expected[section] if section else expected)[field] = value
        assert changed == expected, name


def test_a_coefficient_touches_only_the_arms_that_use_it(small_toml: Path) -> None:
    text = small_toml.read_text().replace('["baseline", "full", "magnitude"]', str(TABLE[:9]).replace("'", '"'))
    small_toml.write_text(text)
    before = make_plan(Experiment.load(str(small_toml)))
    small_toml.write_text(text + "\n[train.contrast]\ncoefficient = 0.15\n")
    after = make_plan(Experiment.load(str(small_toml)))
    assert after.store.key == before.store.key
    changed = {a.arm for a, b in zip(after.saes, before.saes, strict=True) if a.artefact.key != b.artefact.key}
    assert changed == {"full", "magnitude", "unweighted", "topk-0.05", "topk-0.2"}


OWN_ARMS = """
[arms.strong]
question = "What does five times the weight do?"
contrast.coefficient = 0.5
l1 = 0.05

[arms.strong-no-resets]
from = "strong"
question = "And without resets?"
contrast.topk = 0.3
resets = false
"""


def with_own_arms(small_toml: Path, declared: str, arms: str) -> Path:
    text = small_toml.read_text().replace('arms = ["baseline", "full", "magnitude"]', f"arms = {arms}")
    small_toml.write_text(text + declared)
    return small_toml


def test_an_experiment_declares_arms_of_its_own(small_toml: Path) -> None:
    arms = '["full", "strong", "strong-no-resets"]'
    experiment = Experiment.load(str(with_own_arms(small_toml, OWN_ARMS, arms)))
    full, strong, neither = (sae.recipe for sae in make_plan(experiment).to_train)
    assert full == experiment.train
    expected = full.model_dump()
    expected["contrast"]["coefficient"], expected["l1"] = 0.5, 0.05
    assert strong.model_dump() == expected
    expected["contrast"]["topk"], expected["resets"] = 0.3, None
    assert neither.model_dump() == expected


def test_what_an_arm_asks_is_no_part_of_its_identity(small_toml: Path) -> None:
    before = make_plan(Experiment.load(str(with_own_arms(small_toml, OWN_ARMS, '["strong"]'))))
    small_toml.write_text(small_toml.read_text().replace("five times the weight do", "it change"))
    after = make_plan(Experiment.load(str(small_toml)))
    assert after.saes[0].artefact.path == before.saes[0].artefact.path


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("contrast.coeficient = 1", "arms.mine.contrast.coeficient: unknown key"),
        ("contrst.coefficient = 1", "arms.mine.contrst: unknown key"),
        ("contrast.coefficient = -1", "arms.mine.contrast.coefficient: input should be greater than 0, got -1"),
        ("contrast = 1", "arms.mine.contrast: input should be a valid dictionary"),
        ("auxk = true", "arms.mine.auxk: true takes over [train.auxk], and there is none; name its fields"),
        ("l1.weight = 1", "arms.mine.l1: input should be a valid number, got {'weight': 1}"),
        ("base = 'full'", "arms.mine.base: unknown key"),
        ("resets.first = 10", "arms.mine: the first reset, at step 10, would come before warm-up ends at 20"),
        ("from = 'baseline'\ncontrast.topk = 0.2", "arms.mine changes contrast.topk, but 'baseline' has no contrast"),
        ("from = 'later'", "arms.mine.from: no arm 'later' above this one; there are baseline, full"),
        ("from = 'mine'", "arms.mine.from: no arm 'mine' above this one"),
        ("steps = 200", "arms.mine.steps: all arms of a study share steps; set it in [train]"),
        ("heldout_shards = 2", "arms.mine.heldout_shards: all arms of a study share heldout_shards"),
        (
            "decoder_norm = 'unit'\nresets = false\ncontrast = false",
            "study.arms: 'baseline' and 'mine' have the same recipe",
        ),
        ("contrast.coefficient = 0.1", "study.arms: 'full' and 'mine' have the same recipe in this experiment, remove one"),
    ],
)
def test_an_arm_that_cannot_be_is_refused_where_it_is_declared(small_toml: Path, declared: str, message: str) -> None:
    tables = f'\n[arms.mine]\nquestion = "?"\n{declared}\n[arms.later]\nquestion = "?"\nl1 = 0.5\n'
    with pytest.raises(BadInputError) as caught:
        Experiment.load(str(with_own_arms(small_toml, tables, '["baseline", "full", "mine"]')))
    assert f"{small_toml}: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[arms.full]\nquestion = '?'\nl1 = 0.1", "arms.full: there is a built-in arm of this name"),
        ("[arms.'a/b']\nquestion = '?'\nl1 = 0.1", "arms: name 'a/b' must be"),
        ("[arms.'a,b']\nquestion = '?'\nl1 = 0.1", "arms: name 'a,b' must be"),
        (f"[arms.{'a' * 21}]\nquestion = '?'\nl1 = 0.1", "must be at most 20 lower-case letters"),
        ("[arms.mine]\nl1 = 0.1", "arms.mine.question: field required"),
        # Even an arm that the study does not train.
        ("[arms.mine]\nquestion = '?'\nl2 = 0.1", "arms.mine.l2: unknown key"),
    ],
)
def test_an_arm_needs_a_name_of_its_own_and_a_question(small_toml: Path, table: str, message: str) -> None:
    with pytest.raises(BadInputError) as caught:
        Experiment.load(str(with_own_arms(small_toml, f"\n{table}\n", '["full"]')))
    assert message in str(caught.value)


def test_built_in_arms_that_coincide_under_the_experiment_s_values_are_refused(small_toml: Path) -> None:
    declared = "\n[train.contrast]\ncoefficient = 0.2\n"
    with pytest.raises(BadInputError, match=r"study\.arms: 'full' and 'coef-0\.2' have the same recipe"):
        Experiment.load(str(with_own_arms(small_toml, declared, '["full", "coef-0.2"]')))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('arms = ["baseline", "full", "magnitude"]', 'arms = ["fulll"]', "unknown arm 'fulll'; the arms are baseline, full"),
        ("layers = [2]", "layers = [3]", "layer 3 is not among store.layers [1, 2]"),
        ("layers = [1, 2]", "layers = [1, 4]", "layer 4 does not exist, the model has layers 0 to 3"),
        ("tokens = 20_000", "token = 20_000", "store.token: unknown key"),
        ("tokens = 20_000", "tokens = -5", "store.tokens: input should be greater than 0, got -5"),
        ("first = 40", "first = 10", "the first reset, at step 10, would come before warm-up ends at 20"),
        ("chunk_rows = 256", "chunk_rows = 300", "shard_rows 4096 is not a multiple of chunk_rows 300"),
        ("k_values = [1, 5]", "k_values = [1, 3]", "k_values [3] are not in sae-bench's output schema"),
        ("d_sae = 96", "d_sae = 4", "evaluate.k_values: 5 exceeds train.d_sae 4"),
        ("seeds = [0]", "seeds = [0, 0]", "study.seeds [0, 0] names a value twice"),
        ('source = "python"', 'source = "pyhton"', "corpus"),
        ("[corpus]", "[corpus", "is not valid TOML"),
        (
            PYTHON,
            f'{HUB}\nname = "a/b"',
            "corpus: 'a/b' needs `revision`, the 40 hexadecimal digits of a commit, not None; "
            "https://huggingface.co/datasets/a/b/commits/main lists them",
        ),
        (PYTHON, f'{HUB}\nname = "a/b"\nrevision = "main"', "of a commit, not 'main'"),
        (PYTHON, f'{HUB}\nname = "/"\nrevision = "{COMMIT}"', "'/' is a path on this machine: use source = \"files\""),
        (PYTHON, 'source = "files"\npaths = []', "corpus.paths: "),
        (
            TINY,
            f'{HUB}\nname = "a/b"\nd_in = 8\ndepth = 4',
            "model: 'a/b' is no folder, and as a repository needs",
        ),
        (TINY, f'{HUB}\nname = "a/b"\nd_in = 8\ndepth = 4\nrevision = "v1.0"', "not 'v1.0'; https://huggingface.co/a/b/"),
        ("learning_rate = 1e-3", "learning_rate = nan", "train.learning_rate"),
        ("steps = 120", "steps = 9_000_000_000_000_000_000", "train.steps"),
        ("first = 40", "first = 40\n[train.contrast]\ntopk = 1.5", "train.contrast.topk"),
    ],
)
def test_bad_input_is_one_line_that_names_the_value(small_toml: Path, old: str, new: str, message: str) -> None:
    text = small_toml.read_text()
    assert old in text
    small_toml.write_text(text.replace(old, new))
    with pytest.raises(BadInputError) as caught:
        Experiment.load(str(small_toml))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(small_toml) in str(caught.value)


def test_a_pinned_model_and_corpus_count_by_name_and_commit(small_toml: Path) -> None:
    text = small_toml.read_text().replace(TINY, f'{HUB}\nname = "a/model"\nrevision = "{COMMIT}"\nd_in = 8\ndepth = 4')
    text = text.replace(PYTHON, f'{HUB}\nname = "a/corpus"\nrevision = "{COMMIT}"')
    small_toml.write_text(text)
    store = make_plan(Experiment.load(str(small_toml))).store
    assert store.label == "model-corpus"
    assert store.inputs["model"] == {"name": "a/model", "revision": COMMIT, "dtype": "bfloat16"}
    assert store.inputs["corpus"]["revision"] == COMMIT


def test_a_model_in_a_folder_counts_by_content(small_toml: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    small_toml.write_text(small_toml.read_text().replace(TINY, f'{HUB}\nname = "{folder}"\nd_in = 8\ndepth = 4'))
    before = make_plan(Experiment.load(str(small_toml))).store
    assert before.label == "a-model-python"
    assert str(tmp_path) not in str(before.inputs)
    (folder / "merges.txt").write_text("a b")
    assert make_plan(Experiment.load(str(small_toml))).store.key != before.key


def test_an_unknown_experiment_names_the_known_ones() -> None:
    known = (
        "demo, gemma-2-2b, gemma-2-2b-references, gemma-2-2b-rivals, gemma-2b, rivals, synth-sae-bench, "
        "synth-sae-bench-small, synthetic"
    )
    with pytest.raises(BadInputError, match=rf"no experiment 'dmeo' .*known experiments: {known}"):
        Experiment.load("dmeo")


def test_a_part_of_the_study_must_be_part_of_it(small_toml: Path) -> None:
    experiment = Experiment.load(str(small_toml))
    assert [sae.arm for sae in make_plan(experiment, arms=["full"]).saes] == ["full"]
    with pytest.raises(BadInputError, match="arm 'unweighted' is not part of the study"):
        make_plan(experiment, arms=["unweighted"])
    with pytest.raises(BadInputError, match="layer 1 is not part of the study"):
        make_plan(experiment, layers=[1])


def test_where_flows_run_changes_no_artefact(small_toml: Path) -> None:
    local = make_plan(Experiment.load(str(small_toml)))
    small_toml.write_text(small_toml.read_text() + '\n[run]\nengine = "dask"\nworkers = 3\n')
    dask = make_plan(Experiment.load(str(small_toml)))
    assert dask.experiment.run.workers == 3
    assert [artefact.key for artefact in (*dask.extracted, *dask.trained, *dask.evaluated)] == [
        artefact.key for artefact in (*local.extracted, *local.trained, *local.evaluated)
    ]


def test_an_address_without_dask_is_refused(small_toml: Path) -> None:
    small_toml.write_text(small_toml.read_text() + '\n[run]\naddress = "tcp://127.0.0.1:8786"\n')
    with pytest.raises(BadInputError, match=r"address tcp://127.0.0.1:8786 is for engine"):
        Experiment.load(str(small_toml))


def test_an_arm_takes_a_section_over_from_the_whole_method() -> None:
    own = {
        "one": ArmConfig.model_validate({"question": "?", "from": "baseline", "contrast": True}),
        "other": ArmConfig.model_validate({"question": "?", "from": "baseline", "contrast": {"topk": 0.3}, "resets": True}),
    }
    full = TrainConfig(d_sae=8, steps=5000, contrast=Contrast(coefficient=0.7, pair_refresh=4))
    assert Recipes(full, own)["one"].contrast == full.contrast
    with pytest.raises(BadInputError, match=r"changes contrast\.topk, but 'baseline' has no contrast"):
        _ = Recipes(full, own)["other"]
    own["other"] = ArmConfig.model_validate({"question": "?", "from": "one", "contrast": {"topk": 0.3}, "resets": True})
    assert Recipes(full, own)["other"].contrast == Contrast(coefficient=0.7, pair_refresh=4, topk=0.3)
    assert Recipes(full, own)["other"].resets == full.resets
