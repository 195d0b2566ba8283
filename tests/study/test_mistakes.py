"""Wrong things to say to `dasae`, and what it answers: one line that says what is wrong, and an exit code."""

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from small_study import SMALL, Study

from pipeline.cli import main
from pipeline.sae.formats import WEIGHTS

DESCRIPTION = 'description = "A study small enough for a test."'
ARMS = 'arms = ["baseline", "full", "magnitude"]'
STUDY = f"[study]\nlayers = [2]\nseeds = [0]\n{ARMS}"
MINE = '[study]\nlayers = [2]\narms = ["full", "mine"]'
RESETS = "every = 20\nfirst = 40"
SCHEDULE = f"lr_warmup = 20\nl1_warmup = 20\nlearning_rate = 1e-3\n\n[train.resets]\n{RESETS}"
PROBES = 'datasets = ["python/text-kind", "python/docstring-of"]'
TINY = 'source = "tiny"\nsteps = 150\nbatch_size = 8\nvocabulary = 512'
PYTHON = 'source = "python"'
COMMIT = "0123456789abcdef" * 2 + "01234567"


def hub(source: str = "huggingface", **fields: str | int) -> str:
    lines = {"source": source, "d_in": 8, "depth": 4, **fields}
    return "\n".join(f"{name} = {value!r}" for name, value in lines.items())


class Mistake(NamedTuple):
    """A command in a folder with small.toml, the small study; and what it says."""

    words: str
    """FINISHED and BROKEN stand for workspaces of that study."""
    says: str
    toml: tuple[str, str] | None = None
    """What small.toml has instead."""
    files: dict[str, str] | None = None
    code: int = 2


MISTAKES = [
    # The command line.
    Mistake("tarin small.toml", "no such command 'tarin'. Did you mean 'train'?; see dasae --help"),
    Mistake("--debug", "missing command; see dasae --help"),
    Mistake("status", "missing argument 'EXPERIMENT'; see dasae status --help"),
    Mistake("train small.toml full", "got unexpected extra argument(s) (full); see dasae train --help"),
    Mistake("train small.toml --arm full", "no such option: --arm"),
    Mistake("train small.toml --layer", "option '--layer' requires an argument"),
    Mistake("train small.toml --layer two", "invalid value for '--layer': Input should be a valid integer"),
    Mistake("train small.toml --track mlflow", "invalid value for '--track': 'mlflow' is not one of 'tensorboard', 'wandb'"),
    Mistake("export full-s0 out --to zenodo", "invalid value for '--to': 'zenodo' is not one of 'saelens', 'hub'"),
    Mistake("export full-s0", "missing argument 'DIR'; see dasae export --help"),
    Mistake("store inof x", "no such command 'inof'"),
    # Which experiment.
    Mistake(
        "extract small.toml",
        'store.mode "stream" needs train.window_shards, the shards that are mixed with each other, such as 64',
        ("[store]", '[store]\nmode = "stream"'),
    ),
    Mistake(
        "extract small.toml",
        'store: max_norm decides only once a shard is made how many rows it has, and mode "stream" must know',
        ("[store]", '[store]\nmode = "stream"\nmax_norm = 10.0'),
    ),
    Mistake(
        "extract small.toml",
        "store.mode: input should be 'keep' or 'stream', got 'ring'",
        ("[store]", '[store]\nmode = "ring"'),
    ),
    Mistake("feed small.toml", 'small.toml has store.mode "keep", and only "stream" has rows to be made while training'),
    Mistake(
        "extract small.toml",
        "arms.mine.window_shards: all arms of a study share window_shards",
        (STUDY, f"{MINE}\n\n[arms.mine]\nquestion = 'Q?'\nwindow_shards = 2"),
    ),
    Mistake(
        "train dmeo", "no experiment 'dmeo' (experiments/dmeo.toml is not a file); known experiments: none here: run from"
    ),
    Mistake("train small", "no experiment 'small' (experiments/small.toml is not a file); did you mean small.toml?"),
    Mistake("train a/study", "no experiment 'a/study'", files={"a/x": ""}),
    Mistake("train ../../small", "no experiment '../../small'"),
    Mistake("train folder.toml", "no experiment 'folder.toml' (folder.toml is not a file)", files={"folder.toml/x": ""}),
    Mistake("train Mine.toml", "experiment name 'Mine' must be lower-case letters, digits", files={"Mine.toml": SMALL}),
    Mistake("report small.toml other", "no experiment 'other'"),
    Mistake("train other.toml", "other.toml is not valid TOML: ", files={"other.toml": "[model\n"}),
    Mistake("train other.toml", "other.toml: description: field required", files={"other.toml": ""}),
    # Which part of it.
    Mistake(
        "train small.toml --arms fulll", "arm 'fulll' is not part of the study, which has ['baseline', 'full', 'magnitude']"
    ),
    Mistake("train small.toml --arms=", "arm '' is not part of the study"),
    Mistake("train small.toml --arms full,", "arm '' is not part of the study"),
    Mistake("train small.toml --seeds one", "--seeds 'one': give whole numbers separated by commas, such as 0,1"),
    Mistake("train small.toml --seeds=", "--seeds '': give whole numbers"),
    Mistake("train small.toml --seeds -1", "seed -1 is not part of the study, which has [0]"),
    Mistake("evaluate small.toml --layer 7", "layer 7 is not part of the study, which has [2]"),
    # In the wrong order.
    Mistake("train small.toml", "does not exist yet; make it with: dasae extract small.toml"),
    Mistake("evaluate small.toml", "no SAE of small is trained yet; run: dasae train small.toml"),
    Mistake("report small.toml", "nothing of small is evaluated yet; run: dasae ablate small.toml"),
    Mistake("report small.toml small.toml --workspace FINISHED", "small.toml and small.toml are one experiment"),
    # Which workspace.
    Mistake("status small.toml --workspace small.toml", "small.toml is not a folder; name another one with --workspace"),
    Mistake("extract small.toml --workspace small.toml/ws", "small.toml/ws is not a folder; name another one"),
    Mistake("status small.toml --workspace gs://b/p", "workspace 'gs://b/p' is neither a folder nor an s3://bucket/prefix"),
    Mistake("status small.toml --workspace s3:/b/p", "workspace 's3:/b/p' is neither"),
    Mistake("status small.toml --workspace=", "workspace '' is neither a folder nor"),
    # Stores and SAEs.
    Mistake(
        "store info nowhere", "nowhere is no activation store; those of a workspace are in its folders stores/ and probes/"
    ),
    Mistake("store verify nowhere", "nowhere is no activation store"),
    Mistake("store verify small.toml", "small.toml is no activation store"),
    Mistake("store info FINISHED", "is no activation store"),
    Mistake("export ful-s0 out --workspace FINISHED", "which has: baseline-s0, full-s0, magnitude-s0"),
    Mistake("export full-s0 .", "no finished SAE 'full-s0', neither as a path nor in workspace, which has: none"),
    Mistake("export full-s0 . --workspace FINISHED", ". exists and is not an empty folder; name another one"),
    Mistake("export full-s0 small.toml --workspace FINISHED", "small.toml exists and is not an empty folder"),
    Mistake("export full-s0 small.toml/x --workspace FINISHED", "small.toml/x cannot be written: ", code=1),
    Mistake("export full-s0 out --workspace BROKEN", f"{WEIGHTS} is missing or was changed; delete ", code=1),
    Mistake("status small.toml --workspace BROKEN", "manifest.json cannot be read; delete ", code=1),
    # What the file declares.
    Mistake("train small.toml", "unknown arm 'fulll'; the arms are baseline, full", (ARMS, 'arms = ["fulll"]')),
    Mistake("train small.toml", "study.arms: input should be a valid list, got 'full'", (ARMS, 'arms = "full"')),
    Mistake("train small.toml", "train.d_sae: input should be a valid integer, got True", ("d_sae = 96", "d_sae = true")),
    Mistake("train small.toml", "train.d_sae: input should be a valid integer, got '96'", ("d_sae = 96", 'd_sae = "96"')),
    Mistake("train small.toml", "train.d_sae: input should be a valid integer, got 96.0", ("d_sae = 96", "d_sae = 96.0")),
    Mistake("train small.toml", "train.d_sae: input should be a valid integer, got '2026-11-25'", ("= 96", "= 2026-11-25")),
    Mistake("train small.toml", "train.l1: input should be a finite number, got nan", ("d_sae", "l1 = nan\nd_sae")),
    Mistake(
        "train small.toml",
        "arms.mine.contrast.weighted: input should be a valid boolean, got 1",
        ("[study]", '[arms.mine]\nquestion = "?"\ncontrast.weighted = 1\n[study]'),
    ),
    # `tiny` is also a value of model.source, which is no part of a field's name.
    Mistake("train small.toml", "arms.tiny.question: field required", ("[study]", "[arms.tiny]\n[study]")),
    Mistake("train small.toml", "study.seeds.0: input should be greater than or equal to 0, got -1", ("[0]", "[-1]")),
    Mistake("train small.toml", "study.seeds: list should have at least 1 item", ("seeds = [0]", "seeds = []")),
    Mistake(
        "extract small.toml", "store.seed: input should be greater than or equal to 0", ("[store]", "[store]\nseed = -1")
    ),
    Mistake("extract small.toml", "probes.seed: input should be greater", ("[probes]", "[probes]\nseed = -1")),
    Mistake("extract small.toml", "model.seed: input should be greater", (TINY, f"{TINY}\nseed = -1")),
    Mistake(
        "extract small.toml", "layer 9 does not exist, the model has layers 0 to 3", ("layers = [1, 2]", "layers = [1, 9]")
    ),
    Mistake("extract small.toml", "store.layers: list should have", ("layers = [1, 2]", "layers = []")),
    Mistake("extract small.toml", "evaluate.k_values: 100 exceeds train.d_sae 96", ("[1, 5]", "[1, 100]")),
    Mistake("extract small.toml", "evaluate.k_values: list should have at least 1 item", ("[1, 5]", "[]")),
    Mistake(
        "extract small.toml",
        "train.batch_size 100,000 is more than the 16,384 rows to train on; lower it",
        ("batch_size = 128", "batch_size = 100_000"),
    ),
    Mistake(
        "extract small.toml",
        "train.heldout_shards 5 leaves nothing to train on: 20,000 tokens fill 5 shards of 4,096 rows",
        ("[train]", "[train]\nheldout_shards = 5"),
    ),
    Mistake(
        "extract small.toml",
        "train.heldout_shards 1 holds out 2 of 16,386 tokens, and L0 and FVU need at least 256; hold out one shard more",
        ("tokens = 20_000", "tokens = 16_386"),
    ),
    # What a schedule leaves no time for.
    Mistake(
        "extract small.toml",
        "train: lr_warmup 120 is not over before training ends at step 120; lower it",
        (
            f"lr_warmup = 20\nl1_warmup = 20\nlearning_rate = 1e-3\n\n[train.resets]\n{RESETS}",
            "lr_warmup = 120\nresets = false",
        ),
    ),
    Mistake(
        "extract small.toml",
        "arm 'mine': l1_warmup 500 is not over before training ends at step 120; lower it",
        (STUDY, f'[arms.mine]\nquestion = "?"\nresets = false\nl1_warmup = 500\n{MINE}'),
    ),
    Mistake(
        "extract small.toml",
        "study.arms: 'full' and 'mine' differ in their resets alone, and none comes within the 120 steps, remove one",
        (f"{RESETS}\n\n{STUDY}", f'every = 20\nfirst = 110\n[arms.mine]\nquestion = "?"\nresets = false\n{MINE}'),
    ),
    Mistake("train small.toml", "probe: unknown key, check its spelling or remove it", ("[probes]", "[probe]")),
    Mistake("train small.toml", "corpus: field required", (f"[corpus]\n{PYTHON}", "")),
    Mistake("train small.toml", "corpus: 'source' is missing; it says which kind this is", (PYTHON, "")),
    Mistake("train small.toml", "corpus: source should be one of 'python', 'files',", (PYTHON, 'source = "web"')),
    Mistake("train small.toml", "model: source should be one of 'huggingface', 'tiny'", (TINY, 'source = "tny"')),
    Mistake("train small.toml", "description: field required", (DESCRIPTION, "")),
    Mistake("train small.toml", "remove the key `name`, the file name is", (DESCRIPTION, f'{DESCRIPTION}\nname = "x"')),
    Mistake("train small.toml", "train.steps: input should be greater than 0, got 0", ("steps = 120", "steps = 0")),
    Mistake("train small.toml", "train.learning_rate: input should be a valid number", ("1e-3", "'fast'")),
    Mistake(
        "extract small.toml", "store.dtype: input should be 'bfloat16' or 'float32'", ("[store]", "[store]\ndtype='int8'")
    ),
    Mistake("extract small.toml", "store.codec: ", ("[store]", "[store]\ncodec = 'lz4'")),
    Mistake(
        "extract small.toml", "'a/b' needs `revision`, the 40 hexadecimal", (PYTHON, 'source = "huggingface"\nname = "a/b"')
    ),
    # What the file names.
    Mistake("extract small.toml", "'p' is neither a folder with train.parquet and", (PROBES, 'datasets = ["p"]')),
    Mistake("extract small.toml", "p/test.parquet", (PROBES, 'datasets = ["p"]'), {"p/train.parquet": "x"}),
    Mistake("extract small.toml", "probes.datasets is empty, which only a synthetic model may", (PROBES, "datasets = []")),
    Mistake("extract small.toml", "'t/*.txt' matches no file", (PYTHON, 'source = "files"\npaths = ["t/*.txt"]')),
    Mistake("extract small.toml", "'.' is a folder, name its files", (PYTHON, 'source = "files"\npaths = ["."]')),
    Mistake("extract small.toml", "small.toml is in no known format", (PYTHON, 'source = "files"\npaths = ["small.toml"]')),
    Mistake(
        "extract small.toml",
        "a.jsonl:1 has no column 'body'",
        (PYTHON, 'source = "files"\npaths = ["a.jsonl"]\ntext_column = "body"'),
        {"a.jsonl": '{"text": "words"}'},
    ),
    Mistake(
        "extract small.toml", "the corpus holds no text", (PYTHON, 'source = "files"\npaths = ["a.txt"]'), {"a.txt": ""}
    ),
    Mistake("extract small.toml", "m holds no model: it has no config.json", (TINY, hub(name="m")), {"m/x": ""}),
    Mistake("extract small.toml", "a/b is not in the local cache", (TINY, hub(name="a/b", revision=COMMIT))),
]


@pytest.fixture(scope="module")
def broken(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small study's workspace, with weights that were changed and a manifest that is none."""
    workspace = Path(shutil.copytree(study.workspace.root, tmp_path_factory.mktemp("broken") / "workspace"))
    (full,) = workspace.glob(f"saes/full-*/{WEIGHTS}")
    full.write_bytes(full.read_bytes()[:-1] + b"x")
    (baseline,) = workspace.glob("saes/baseline-*/manifest.json")
    baseline.write_text("{")
    return workspace


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.says[:50])
def test_a_mistake_is_answered_in_one_line(
    mistake: Mistake,
    study: Study,
    broken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = SMALL
    if mistake.toml:
        assert mistake.toml[0] in text
        text = text.replace(*mistake.toml, 1)
    for name, content in {"small.toml": text, **(mistake.files or {})}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    # What it will take is announced before an extraction, and is no part of the answer.
    monkeypatch.setattr("pipeline.extract.extraction.describe", lambda *_: "announced")
    words = mistake.words.replace("FINISHED", str(study.workspace.root)).replace("BROKEN", str(broken))
    before = files_below(tmp_path), files_below(broken), files_below(Path(study.workspace.root))
    monkeypatch.setattr(sys, "argv", ["dasae", *words.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    answer = printed.err.removeprefix("announced\n")
    assert ended.value.code == mistake.code
    assert answer.startswith("error: ")
    assert answer.count("\n") == 1
    assert mistake.says in answer
    assert not printed.out
    assert (files_below(tmp_path), files_below(broken), files_below(Path(study.workspace.root))) == before


def files_below(folder: Path) -> dict[str, int]:
    """Files and when they were written; locks are no one's result."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts)
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_without_a_command_there_is_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dasae"])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert "Usage: dasae" in printed.out + printed.err
    assert "error" not in printed.err


def test_an_interrupt_says_how_to_go_on(
    small_toml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.study.status.Status.table", interrupted)
    monkeypatch.setattr(sys, "argv", ["dasae", "status", str(small_toml)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to go on\n"
