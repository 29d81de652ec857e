# pyright: basic
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.ending import interruptible, pause, undisturbed
from orchestrator.replay import _new_folder
from trainers.rundir import RunDir

SIGNALS = pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])


class Finalized:
    """Calls `what` when it goes; Python drops what that raises."""

    def __init__(self, what: Callable[[], None]) -> None:
        self.what = what

    def __del__(self) -> None:
        self.what()


@pytest.fixture(autouse=True)
def ctrl_c():
    """What a terminal's program has; a shell that starts the tests in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(*signs: signal.Signals) -> None:
    for sign in signs:
        os.kill(os.getpid(), sign)


@SIGNALS
def test_a_signal_ends_the_block_at_its_next_pause_and_is_forgotten_after_it(sign: signal.Signals) -> None:
    before = signal.getsignal(sign)
    with interruptible():
        send(sign)
        with pytest.raises(KeyboardInterrupt):
            pause(0)
    assert signal.getsignal(sign) is before
    pause(0)


@SIGNALS
def test_a_pause_is_cut_short(sign: signal.Signals) -> None:
    begin = time.monotonic()
    with interruptible():
        threading.Timer(0.2, send, [sign]).start()
        with pytest.raises(KeyboardInterrupt):
            pause(60)
    assert time.monotonic() - begin < 30


@SIGNALS
def test_a_repeated_signal_ends_the_block_at_once(sign: signal.Signals) -> None:
    with interruptible(), pytest.raises(KeyboardInterrupt):
        send(signal.SIGTERM, sign)


@SIGNALS
def test_a_signal_inside_of_a_finalizer_is_heard(sign: signal.Signals) -> None:
    with interruptible():
        Finalized(lambda: send(sign))
        gc.collect()
        with pytest.raises(KeyboardInterrupt):
            pause(0)


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible():
        send(signal.SIGINT)
        pause(0)


@SIGNALS
def test_undisturbed_work_is_not_ended(sign: signal.Signals) -> None:
    with interruptible(), undisturbed():
        send(sign)
        pause(0)


def test_a_replay_is_written_beside_the_earlier_ones_even_if_one_was_deleted(tmp_path: Path) -> None:
    trial = RunDir(tmp_path / "trials" / "0003")
    folders = [_new_folder(tmp_path, trial).path for _ in range(2)]
    folders[0].rmdir()
    assert _new_folder(tmp_path, trial).path == tmp_path / "replays" / "0003-3"
