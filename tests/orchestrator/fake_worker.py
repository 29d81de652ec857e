"""A job that trains nothing: takes the run's lock, counts to ten in a checkpoint file, and writes scores.

What it should do instead is in `behaviour.txt` of the study's folder: `hang`, `stubborn` (ignores SIGTERM and has a
child), or `slow`.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.orchestrator.studies import score
from trainers.rundir import RunDir, thaw, write_atomically

STEPS = 10
STEP_SECONDS = 0.05


def main() -> None:
    run = RunDir(Path(sys.argv[1]))
    with (run.path / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if run.result.exists():
            return
        file = run.path.parents[1] / "behaviour.txt"
        behaviour = file.read_text() if file.exists() else ""
        if behaviour in {"hang", "stubborn"}:
            hang(run, behaviour)
        train(run, 20 * STEP_SECONDS if behaviour == "slow" else STEP_SECONDS)


def hang(run: RunDir, behaviour: str) -> None:
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (run.path / "pid").write_text(str(os.getpid()))
    time.sleep(600)


def train(run: RunDir, step_seconds: float) -> None:
    lr = thaw(run.trial, sys.argv[sys.argv.index("--sha256") + 1])["train"]["optimizer"]["lr"]
    checkpoint = run.path / "steps.txt"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    for step in range(first, STEPS):
        time.sleep(step_seconds)
        run.append("train", step=step + 1, loss=1.0, pid=os.getpid())
        write_atomically(checkpoint, str(step + 1))
    score(run, clip_t=lr)


if __name__ == "__main__":
    main()
