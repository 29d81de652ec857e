"""A job of the crash test: an agent and its rank, as torchrun has them, that need the standard library alone.

The rank dies with its agent, takes the run's lock, counts to ten in a file, and scores the rate that it read.
"""

# pyright: basic

import ctypes
import fcntl
import hashlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

STEPS = 10
STEP_SECONDS = 0.03
_PR_SET_PDEATHSIG = 1


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_rate(run: Path, sha256: str) -> float:
    head, _, body = (run / "trial.yaml").read_text().partition("\n")
    assert head == f"sha256: {sha256}"
    assert hashlib.sha256(body.encode()).hexdigest() == sha256
    found = re.search(r"^ +lr: (\S+)$", body, re.MULTILINE)
    assert found
    return float(found[1])


def train(run: Path, sha256: str) -> None:
    rate, checkpoint = read_rate(run, sha256), run / "steps.txt"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    for step in range(first, STEPS):
        time.sleep(STEP_SECONDS)
        event = {"time": time.time(), "event": "train", "step": step + 1, "loss": 1.0, "pid": os.getpid()}
        with (run / "events.jsonl").open("a") as file:
            file.write(json.dumps(event) + "\n")
        write(checkpoint, str(step + 1))
    score = {"standard_error": 0.01, "num_samples": 2, "model": "none"}
    scores = {"clip_t": {"mean": rate, **score}, "clip_i": {"mean": 0.5, **score}}
    write(run / "result.json", json.dumps({"scores": scores, "seconds": {}, "peak_bytes": 1, "versions": {}}))


def rank(run: Path, sha256: str, agent: int) -> int:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != agent:
        return 1
    with (run / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 3
        if not (run / "result.json").exists():
            train(run, sha256)
    return 0


def main() -> int:
    run, sha256 = Path(sys.argv[1]), sys.argv[sys.argv.index("--sha256") + 1]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # the agent is torchrun itself
        return rank(run, sha256, os.getppid())
    agent = os.getpid()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os._exit(rank(run, sha256, agent))

    def forward(*_: object) -> None:
        os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, forward)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
