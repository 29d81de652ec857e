import gc
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from orchestrator.launcher import BusyError, patiently
from orchestrator.signals import interruptible, pause, undisturbed

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


@SIGNALS
def test_what_came_before_undisturbed_work_is_heard_after_it(sign: signal.Signals) -> None:
    with interruptible():
        send(sign)
        with undisturbed():
            pause(0)
        with pytest.raises(KeyboardInterrupt):
            pause(0)


@SIGNALS
def test_a_wait_for_an_engine_that_is_away_is_cut_short(sign: signal.Signals) -> None:
    def ask() -> None:
        raise BusyError("away")

    with interruptible():
        threading.Timer(0.2, send, [sign]).start()
        with pytest.raises(KeyboardInterrupt):
            patiently(ask, minutes=1, pause_seconds=0.01)
