"""Three hundred trials by one controller: does it grow, and does it leave anything behind?

    make soak            (python -m tests.benchmarks.soak --trials 300)

The controller is the command line's own `run` with TPE, real SQLite and MLflow over a file. Jobs are an agent and a
rank as torchrun has them, which need the standard library alone and last a second (`tests/integration/crash_job.py`):
what is looked at is the controller, and three hundred trainings would take hours. This process looks from outside.
"""

# pyright: basic

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import yaml

from tests.orchestrator.studies import build_world

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "soak.md"
HOLDS = """\
What holds it, by tracemalloc over 50 trials and by the size of what is reachable: MLflow keeps a pool of threads and a
queue for each of the last 1,024 runs that got a file, 8 KiB each; Optuna's TPE has two caches of 1,000 arrays, 3 KiB a
trial until they are full; a trial is 2 KiB as Optuna remembers it and 1 KiB as the controller, the tracker's mirror and
the display do. A study of 10,000 trials needs 11 MiB for the caches and, as was measured without a tracker
(scale.md), some 50 for its trials.
"""
EVERY = 25
PARALLEL = 2


@dataclass(frozen=True)
class Look:
    """At the controller, while it runs."""

    trials: int
    mebibytes: float
    files: int
    threads: int
    processes: int
    """Of jobs."""


def be_controller(study: Path) -> int:
    """In a process of its own: the command line, with light jobs."""
    from orchestrator import controller
    from orchestrator.__main__ import main as command_line
    from tests.integration import schedule  # noqa: F401  registers the launcher

    controller.WORKER = "tests.integration.crash_job"
    return command_line(["run", str(study)])


def build_study(folder: Path, trials: int) -> Path:
    path = build_world(folder)
    tree = yaml.safe_load(path.read_text())
    tree["launcher"] = {"kind": "agent", "gpus": [], "poll_seconds": 0.1}
    tree["limits"] = {"trials": trials, "parallel": PARALLEL}
    tree["tracker"] = {"kind": "mlflow"}
    path.write_text(yaml.safe_dump(tree))
    return path


def watch(controller: subprocess.Popen[bytes], folder: Path) -> list[Look]:
    """Look every so many trials until it ends."""
    from tests.integration.schedule import jobs

    looks: list[Look] = []
    seen = psutil.Process(controller.pid)
    while controller.poll() is None:
        done = len(list((folder / "runs" / "t" / "trials").glob("*/result.json")))
        if done >= EVERY * (len(looks) + 1):
            size = seen.memory_info().rss / 2**20
            looks.append(Look(done, size, seen.num_fds(), seen.num_threads(), len(jobs(folder)) - 1))
        time.sleep(0.2)
    assert controller.returncode == 0, f"the controller ended with {controller.returncode}"
    return looks


def growth(looks: list[Look]) -> float:
    """KiB a trial in the second half, by least squares."""
    half = looks[len(looks) // 2 :]
    return float(np.polyfit([look.trials for look in half], [look.mebibytes for look in half], 1)[0]) * 1024


def left_behind(folder: Path, temporary: Path) -> dict[str, int]:
    from tests.integration.schedule import jobs

    halves = [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".reserve")]
    return {
        "processes": len(jobs(folder)),
        "files in TMPDIR": len(list(temporary.rglob("*"))),
        "half-written files in the study": len(halves),
    }


def table(looks: list[Look], left: dict[str, int], seconds: float) -> str:
    rows = [f"| {o.trials} | {o.mebibytes:.1f} | {o.files} | {o.threads} | {o.processes} |" for o in looks]
    lines = [
        "# Soak",
        "",
        f"`make soak`: {looks[-1].trials} trials, {PARALLEL} at a time, in {seconds:.0f} s by one controller on "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}.",
        "TPE, SQLite, MLflow over a file. Jobs are an agent and a rank without torch: the controller is looked at.",
        "",
        f"Growth of the controller's memory over the second half: **{growth(looks):.1f} KiB a trial**. Left behind: "
        + ", ".join(f"{count} {what}" for what, count in left.items())
        + ".",
        "",
        *HOLDS.splitlines(),
        "",
        "| trials | controller, MiB | open files | threads | processes of jobs |",
        "| --: | --: | --: | --: | --: |",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--controller", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.controller:
        return be_controller(options.controller)
    with tempfile.TemporaryDirectory() as name:
        folder, temporary = Path(name) / "study", Path(name) / "tmp"
        folder.mkdir()
        temporary.mkdir()
        study = build_study(folder, options.trials)
        words = [sys.executable, "-m", "tests.benchmarks.soak", "--controller", str(study)]
        environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
        begin = time.monotonic()
        with (folder / "said.txt").open("wb") as said:
            controller = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=said, stderr=said)
            looks = watch(controller, folder)
        text = table(looks, left_behind(folder, temporary), time.monotonic() - begin)
    RESULT.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
