"""Requests to stop: what each signal sets, raises and leaves behind."""

import signal
import threading

import pytest

from pipeline.errors import InterruptedRunError
from pipeline.runtime.interrupt import stop_on_signal, stop_when


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_asks_to_stop_and_gives_its_exit_code(number: signal.Signals, code: int) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def asked() -> None:
        with stop_on_signal() as stop:
            assert not stop.is_set()
            signal.raise_signal(number)
            assert stop.is_set()
            raise InterruptedRunError("stopped")

    with pytest.raises(InterruptedRunError) as caught:
        asked()
    assert caught.value.exit_code == code
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_second_ctrl_c_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with stop_on_signal():
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err == "\nsaving the work in hand; press Ctrl-C again to end at once\n"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_runs_in_the_background_goes_on_ignoring_ctrl_c() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_is_asked_by_its_caller_alone() -> None:
    request, seen = threading.Event(), list[bool]()

    def work() -> None:
        with stop_when(request), stop_on_signal() as stop:
            request.set()
            seen.append(stop.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]
