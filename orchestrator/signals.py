"""Ctrl-C and SIGTERM: when they end a study, and when they do not."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import FrameType

_LOOK_SECONDS = 0.1
"""Between two looks for a signal."""
_signals: list[int] = []
"""What asked this process to end, since `interruptible` began."""


@contextmanager
def interruptible() -> Generator[None]:
    """Let Ctrl-C and SIGTERM end the block by KeyboardInterrupt: at its next `pause`, or at once when repeated.

    Not at once the first time: what a signal's handler raises inside of a finalizer is dropped, and inside of
    pydantic's serialization it looks like a mistake in the study.
    """
    listened = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's job in the background: Ctrl-C means another
        listened.remove(signal.SIGINT)
    before = {number: signal.signal(number, _note) for number in listened}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _signals.clear()


def _note(number: int, _frame: FrameType | None) -> None:
    _signals.append(number)
    if len(_signals) > 1:
        raise KeyboardInterrupt


def pause(seconds: float) -> None:
    """Sleep between two looks at jobs.

    Raises:
        KeyboardInterrupt: A signal came, now or since `interruptible` began.
    """
    deadline = time.monotonic() + seconds
    while not _signals and (rest := deadline - time.monotonic()) > 0:
        time.sleep(min(rest, _LOOK_SECONDS))
    if _signals:
        raise KeyboardInterrupt


@contextmanager
def undisturbed() -> Generator[None]:
    """Ignore Ctrl-C and SIGTERM: the second Ctrl-C must not leave jobs behind that the first one was to end."""
    if threading.current_thread() is not threading.main_thread():  # which signals do not reach
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    noted = list(_signals)
    _signals.clear()  # a `pause` is none of an end
    try:
        yield
    finally:
        _signals.extend(noted)
        for number, handler in before.items():
            signal.signal(number, handler)
