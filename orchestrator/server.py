"""A local web server as a child process that cannot outlive its parent's end."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from orchestrator import lead
from trainers.errors import TrackerError

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import FrameType

HOST = "127.0.0.1"
_START_SECONDS = 300.0
_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.2


def choose_port(wanted: int) -> int:
    """`wanted` if nothing listens there, otherwise a free port."""
    for port in (wanted, 0):
        with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise TrackerError(f"{HOST}: no port is free; expected {wanted} or any other; close some programs")


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], health: str
) -> "Generator[subprocess.Popen[bytes]]":
    """Start a server, wait until `health` answers, and end all its processes on the way out.

    SIGTERM ends the block as Ctrl-C does.

    Raises:
        TrackerError: It ended, or did not answer in five minutes.
    """
    previous = signal.signal(signal.SIGTERM, _interrupt)
    words = (sys.executable, "-I", "-S", lead.__file__, str(os.getpid()), "", *command)
    process = subprocess.Popen(  # noqa: S603
        words, env={**os.environ, **environment}, start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        _wait_until_healthy(process, health)
        yield process
    finally:
        _end(process)
        signal.signal(signal.SIGTERM, previous)


def _interrupt(_signal: int, _frame: "FrameType | None") -> None:
    raise KeyboardInterrupt


def _wait_until_healthy(process: "subprocess.Popen[bytes]", health: str) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine is not behind its own proxy
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise TrackerError(f"{health}: the server ended with code {process.returncode}; its words are above")
        try:
            with direct.open(health, timeout=2):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(_POLL_SECONDS)
    raise TrackerError(f"{health}: no answer after {_START_SECONDS:.0f} s; expected a running server")


def _end(process: "subprocess.Popen[bytes]") -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(_STOP_SECONDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()
