"""What a trial costs outside training and sampling, next to the usual way of scripting a search.

    python -m tests.benchmarks.overhead [--trials 6]

Both ways run the same frozen trials of `studies/hpo.yaml`, one after the other, in one run on one machine:

- ours: `python -m orchestrator run`, with SQLite, MLflow, a cache that trials share, and sampling in batches by the
  job that trained;
- scripted: for each trial a `torchrun` that loads the models, encodes every picture and trains; then the calling
  process loads the base again with the adapter, draws one picture at a time, loads the scoring models and scores.

Results go to tests/benchmarks/results/overhead.md.
"""

# pyright: basic

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from evaluation.evaluate import evaluate, open_scorers
from orchestrator.spec import TrialSpec
from orchestrator.worker import stage_seconds
from trainers.rundir import RunDir, RunResult, thaw
from trainers.train import build_accelerator, train

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
STAGES = ("train", "sample")
"""The work itself; all the rest is overhead."""


def ours(folder: Path, trials: int) -> tuple[list[dict[str, float]], float]:
    """Seconds of each stage of each trial, and of the whole command."""
    sets = {
        "output": folder,
        "confirm_seeds": 0,
        "search": "{train.optimizer.lr: {kind: float, low: 1e-4, high: 1e-3}}",
    }
    words = [word for path, value in sets.items() for word in ("--set", f"{path}={value}")]
    command = [sys.executable, "-m", "orchestrator", "run", str(ROOT / "studies" / "hpo.yaml"), *words]
    started = time.monotonic()
    subprocess.run([*command, "--trials", str(trials)], check=True, cwd=ROOT)
    passed = time.monotonic() - started
    runs = [RunDir(path) for path in sorted((folder / "hpo" / "trials").iterdir())]
    return [RunResult.model_validate_json(run.result.read_text()).seconds for run in runs], passed


def scripted(frozen: Path, run: RunDir) -> dict[str, float]:
    """The same for one trial, the usual way; the seconds of the stages that it shares with ours, and of the whole."""
    started = time.monotonic()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    subprocess.run(
        [*torchrun, "-m", "tests.benchmarks.overhead", "--train", str(frozen), str(run.path)], check=True, cwd=ROOT
    )
    spec = TrialSpec.model_validate(thaw(frozen))
    model = spec.train.load_trained(run.adapter, build_accelerator(spec.train))
    one_by_one = spec.evaluate.model_copy(update={"batch_size": 1})
    with tempfile.TemporaryDirectory() as cache:
        scorers = open_scorers(one_by_one, spec.train.data.split().held_out, model.device, Path(cache))
        evaluate(model, one_by_one, scorers, run)
    return stage_seconds(run) | {"total": time.monotonic() - started}


def train_alone(frozen: Path, run: RunDir) -> None:
    """Inside the scripted way's torchrun."""
    spec = TrialSpec.model_validate(thaw(frozen))
    accelerator = build_accelerator(spec.train)
    train(spec.train, run, spec.seed, None, accelerator)
    accelerator.end_training()


def compare(trials: int) -> pd.DataFrame:
    """Mean seconds of a trial, one row for each way."""
    with tempfile.TemporaryDirectory() as folder:
        stages, passed = ours(Path(folder) / "ours", trials)
        frozen = sorted((Path(folder) / "ours" / "hpo" / "trials").glob("*/trial.yaml"))
        usual = [scripted(file, RunDir(Path(folder) / "scripted" / file.parent.name)) for file in frozen]
    rows = pd.DataFrame({"ours": pd.DataFrame(stages).mean(), "scripted": pd.DataFrame(usual).mean()}).T
    rows.loc["ours", "total"] = passed / trials
    rows["overhead"] = rows["total"] - rows[list(STAGES)].sum(axis=1)
    return rows.loc[:, [*STAGES, "overhead", "total"]]


def main() -> None:
    """Measure both ways and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--train", nargs=2, type=Path, metavar=("TRIAL_YAML", "RUN_DIR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train_alone(arguments.train[0], RunDir(arguments.train[1]))
        return
    rows = compare(arguments.trials)
    ratios = rows.loc["scripted"] / rows.loc["ours"]
    lines = [
        "# Overhead of a trial",
        "",
        f"`python -m tests.benchmarks.overhead --trials {arguments.trials}` on {platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}.",
        "Mean seconds of a trial; overhead is everything but training and sampling. The script describes both ways.",
        "",
        "| | " + " | ".join(rows.columns) + " |",
        "| --- |" + " --: |" * len(rows.columns),
        *(f"| {name} | " + " | ".join(f"{value:.1f}" for value in row) + " |" for name, row in rows.iterrows()),
        "| scripted / ours | " + " | ".join(f"{value:.2f}" for value in ratios) + " |",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overhead.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
