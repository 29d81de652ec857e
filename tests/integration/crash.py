"""Faults at random moments of a study that runs on real processes and real SQLite; the same command then finishes it.

    python -m tests.integration.crash --seeds 0 100 [--table tests/benchmarks/results/crash.md]

Every schedule is a function of its seed. Controllers are forked from this process, so that each costs milliseconds;
they run the command line's own `run`. Jobs are an agent with a rank, as torchrun has them (`crash_job`); every tenth
seed uses torchrun itself, and every tenth mirrors to an MLflow server that is killed too. As root, the study lies on a
small disk of its own, which is filled and made read-only.
"""

# pyright: basic

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator import controller
from tests.integration.schedule import FAULTS, TRIALS, Report, Schedule, has_server, uses_torchrun

_DISK = "24m"


@contextmanager
def disk(folder: Path) -> Iterator[bool]:
    """A small disk at `folder`; False if this machine allows none."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", folder], check=False)
    try:
        yield made.returncode == 0
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", "--lazy", folder], check=True)


def run(seed: int) -> Report:
    """One schedule in a folder of its own."""
    controller.WORKER = "tests.integration.crash_job"
    above = Path(tempfile.mkdtemp(prefix=f"crash{seed}-"))
    try:
        with disk(above / "study") as has_disk:
            return Schedule(above / "study", seed, has_disk=has_disk).run()
    finally:
        shutil.rmtree(above, ignore_errors=True)


def table(reports: list[Report]) -> str:
    """Every number that the schedules gave, for people."""
    faults = Counter(name for report in reports for name in report.faults)
    bad = [report for report in reports if report.problems]
    lines = [
        "# Crash test",
        "",
        f"`make crash`: {len(reports)} random schedules of {FAULTS} faults each on a study of {TRIALS} trials; real",
        "processes, real SQLite, the command line's own `run`. Afterwards the same command finishes the study.",
        f"{sum(uses_torchrun(r.seed) for r in reports)} of them start jobs by torchrun itself, and "
        f"{sum(has_server(r.seed) for r in reports)} mirror to an MLflow server that is killed too.",
        "",
        f"Trials lost, told twice or with wrong parameters, jobs left over or doubled, hangs and tracebacks: "
        f"**{len(bad)} of {len(reports)} schedules**.",
        "",
        f"{sum(r.controllers for r in reports)} controllers and {sum(r.jobs for r in reports)} jobs that trained, in "
        f"{sum(r.seconds for r in reports):.0f} s on {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}.",
        "",
        "| fault | times |",
        "| --- | --- |",
        *(f"| {name.replace('_', ' ')} | {count} |" for name, count in faults.most_common()),
    ]
    lines += [f"\nSeed {report.seed}: {problem}" for report in bad for problem in report.problems]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs=2, required=True, metavar=("FIRST", "END"))
    parser.add_argument("--reports", type=Path, required=True, help="one JSON object a seed; goes on there")
    parser.add_argument("--table", type=Path, help="write what all reports in the file say, as Markdown")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no disk stays mounted
    known = (
        [Report(**json.loads(line)) for line in options.reports.read_text().splitlines()]
        if options.reports.exists()
        else []
    )
    done = {report.seed for report in known}
    for seed in range(*options.seeds):
        if seed not in done:
            known.append(run(seed))
            with options.reports.open("a") as file:
                file.write(json.dumps(known[-1].__dict__) + "\n")
            print(f"seed {seed}: {known[-1].problems or 'nothing lost'} ({known[-1].seconds:.1f} s)", flush=True)
    if options.table:
        options.table.write_text(table(known))
    return int(any(report.problems for report in known))


if __name__ == "__main__":
    sys.exit(main())
