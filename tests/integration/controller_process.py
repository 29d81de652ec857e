"""A real controller over real SQLite and real processes; only what its jobs run is fake (see `fake_worker`).

With `--die-after NAME` first, it kills itself with signal 9 after the named call, or before it for `tell`.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Literal

import optuna

from orchestrator import controller
from orchestrator.__main__ import main
from orchestrator.launcher import Job
from orchestrator.launchers.local import LocalLauncher


class ScriptLauncher(LocalLauncher):
    """One plain process a job: torchrun takes seconds to start."""

    kind: Literal["script"] = "script"

    def command(self, job: Job) -> tuple[str, ...]:
        return sys.executable, "-m", job.module, *job.arguments


PLACES: dict[str, tuple[type, str]] = {
    "ask": (optuna.Study, "ask"),
    "freeze": (controller.Controller, "_freeze"),
    "submit": (LocalLauncher, "submit"),
    "tell": (optuna.Study, "tell"),
}


def die_after(place: str) -> None:
    owner, name = PLACES[place]
    real: Callable[..., Any] = getattr(owner, name)

    def fatal(*args: Any, **kwargs: Any) -> None:
        if place != "tell":
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, fatal)


if __name__ == "__main__":
    controller.WORKER = "tests.orchestrator.fake_worker"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if a shell started the tests in the background
    arguments = sys.argv[1:]
    if arguments[0] == "--die-after":
        die_after(arguments[1])
        arguments = arguments[2:]
    sys.exit(main(arguments))
