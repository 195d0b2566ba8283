"""What the three commands share: exit codes, one line for an error, and where the workspace is."""

from pathlib import Path

import pytest

from pipeline.errors import BadInputError, InterruptedRunError, PipelineError
from pipeline.front import open_workspace, plan_of, run

NO_ROOM = "error: Cannot allocate memory; solve that, then run the same command again\n"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (BadInputError("no such arm"), 2, "error: no such arm\n"),
        (PipelineError("the disk is full"), 1, "error: the disk is full\n"),
        (InterruptedRunError("stopped"), 143, "error: stopped\n"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried"), 1, NO_ROOM),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to go on\n"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    error: BaseException, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        raise error

    assert run(command) == code
    assert capsys.readouterr() == ("", says)


def test_what_is_no_error_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


def test_the_workspace_is_the_argument_or_the_variable_or_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DASAE_WORKSPACE", raising=False)
    assert open_workspace().root == "workspace"
    monkeypatch.setenv("DASAE_WORKSPACE", str(tmp_path / "variable"))
    assert open_workspace().root == str(tmp_path / "variable")
    assert open_workspace(str(tmp_path / "argument")).root == str(tmp_path / "argument")
    with pytest.raises(BadInputError, match="workspace '' is neither a folder nor an s3"):
        open_workspace("")


def test_a_plan_of_a_part_of_a_study(small_toml: Path) -> None:
    assert [str(sae) for sae in plan_of(str(small_toml), ["full"], layer=2).saes] == ["full seed 0 layer 2"]
    with pytest.raises(BadInputError, match="layer 7 is not part of the study"):
        plan_of(str(small_toml), layer=7)


def test_what_the_machine_refuses_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(lambda: len((tmp_path / "none").read_bytes())) == 1
    said = f"error: {tmp_path / 'none'}: No such file or directory; solve that, then run the same command again\n"
    assert capsys.readouterr().err == said
    with pytest.raises(FileNotFoundError):
        run(lambda: len((tmp_path / "none").read_bytes()), debug=True)
