"""The real worker around work that fails as `RunDir/failure.txt` says, for each rank: `RANK EXPRESSION` a line."""

# pyright: basic

import os
import sys
import time
from pathlib import Path

from orchestrator import worker
from trainers import errors
from trainers.rundir import RunDir


def fail(run: RunDir, sha256: str, cache: Path, trained: Path | None) -> None:
    print(f"working with {sha256}")
    for line in (run.path / "failure.txt").read_text().splitlines():
        rank, _, expression = line.partition(" ")
        if rank == os.environ.get("RANK", "0"):
            exec(expression, {"run": run, "os": os, "time": time, **vars(errors)})


if __name__ == "__main__":
    worker._work = fail
    sys.exit(worker.main())
