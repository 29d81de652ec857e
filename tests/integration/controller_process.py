"""A real controller over real SQLite and real processes; only what its jobs run is fake (see `fake_worker`)."""

import sys
from pathlib import Path
from typing import Literal

from orchestrator import controller
from orchestrator.__main__ import main
from orchestrator.launcher import Job
from orchestrator.launchers.local import LocalLauncher


class ScriptLauncher(LocalLauncher):
    """One plain process a job: torchrun takes seconds to start."""

    kind: Literal["script"] = "script"

    def command(self, job: Job) -> tuple[str, ...]:
        return sys.executable, "-m", job.module, *job.arguments


if __name__ == "__main__":
    controller.WORKER = "tests.orchestrator.fake_worker"
    sys.exit(main(["run", str(Path(sys.argv[1])), *sys.argv[2:]]))
