"""Memory of training: the peak of each method's study, and whether it grows with the number of steps.

    python -m tests.benchmarks.memory [studies/dreambooth.yaml …] [--steps 500] [--batch-size 2] [--keep FOLDER]

Each study's template is trained by a process of its own, with a study of each method by default. Device memory is
what torch has allocated on CUDA; on a CPU it is the process's resident memory, interpreter and libraries included.
Growth is the median of the last fifth of the steps less that of the second fifth: the first fills caches. With
`--set train.gradient_checkpointing=true` and the like, options can be compared. What lies in FOLDER, a file for each
study, is not measured again.

Results go to tests/benchmarks/results/memory.md.
"""

# pyright: basic

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from orchestrator.spec import load_study
from trainers.loop import fit
from trainers.memory import peak_bytes
from trainers.rundir import RunDir
from trainers.train import build_accelerator

ROOT = Path(__file__).parents[2]
METHODS = ("sdxl_lora", "refiner", "dreambooth", "pdmbooth", "ip_adapter", "photomaker")
RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20


@dataclass(frozen=True)
class Watched(RunDir):
    """A run that notes how much memory is in use whenever something is reported."""

    used: list[int] = field(default_factory=list[int])

    def append(self, event: str, **values: Any) -> None:
        """Note, and report as ever."""
        if event == "train":
            self.used.append(in_use())
        super().append(event, **values)


def in_use() -> int:
    """Bytes in use now."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def measure(study: Path, steps: int, batch_size: int, sets: list[str]) -> dict[str, float]:
    """MiB after loading, at the peak, and grown while training; inside a process of its own."""
    every = max(1, steps // 50)
    lengths = {"steps": steps, "batch_size": batch_size, "log_every": every, "checkpoint_every": steps}
    words = [f"trial.train.{name}={value}" for name, value in lengths.items()]
    spec, _ = load_study(study, [*words, *(f"trial.{word}" for word in sets)])
    config = spec.trial.train
    accelerator = build_accelerator(config)
    with tempfile.TemporaryDirectory() as folder:
        method = config.build(0, Path(folder) / "cache", accelerator)
        loaded = in_use()
        run = Watched(Path(folder) / "run")
        fit(method, config, run, accelerator)
    fifth = len(run.used) // 5
    growth = statistics.median(run.used[-fifth:]) - statistics.median(run.used[fifth : 2 * fifth])
    peak = peak_bytes(accelerator.device)
    return {"loaded": loaded / MIB, "peak": peak / MIB, "growth": growth / MIB}


def main() -> None:
    """Measure every study and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="train.path=value")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(measure(arguments.studies[0], arguments.steps, arguments.batch_size, arguments.set)))
        return
    options = ["--steps", str(arguments.steps), "--batch-size", str(arguments.batch_size)]
    options += [word for value in arguments.set for word in ("--set", value)]
    rows: dict[str, dict[str, float]] = {}
    for study in arguments.studies or [ROOT / "studies" / f"{method}.yaml" for method in METHODS]:
        rows[study.stem] = row_of(study, options, arguments.keep)
        print(study.stem, rows[study.stem], flush=True)
    write_table(rows, options)


def row_of(study: Path, options: list[str], keep: Path | None) -> dict[str, float]:
    """A study's numbers, from a process of its own, or from where they are kept."""
    kept = keep / f"{study.stem}.json" if keep else None
    if kept and kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "tests.benchmarks.memory", str(study), "--inside", *options]
    answer = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(answer + "\n", encoding="utf-8")
    return json.loads(answer)


def write_table(rows: dict[str, dict[str, float]], options: list[str]) -> None:
    """The committed page."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    lines = [
        "# Memory of training",
        "",
        f"`python -m tests.benchmarks.memory {' '.join(options)}` on {device}, torch {torch.__version__}. MiB.",
        "",
        "| study | loaded | peak | growth |",
        "| --- | --: | --: | --: |",
        *(f"| {name} | {row['loaded']:.0f} | {row['peak']:.0f} | {row['growth']:+.1f} |" for name, row in rows.items()),
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
