"""Is the winner really better? The winner, the study's defaults and the untrained base on seeds that no trial saw.

The largest of many noisy values is partly luck, so the winner is judged again, on prompts of the panel with fresh
seeds, next to the base and to the first trial. All three draw the same (prompt, seed) pairs: differences are paired.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.launcher import Job, JobState
from orchestrator.spec import StudySpec, TrialSpec
from trainers.config import Config
from trainers.errors import LaunchError
from trainers.rundir import Measured, RunDir, freeze, thaw, write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence

    from evaluation.records import Record

_FRESH = 1_000_003
"""Added to fresh seeds; trials use small ones."""


class Advantage(Config):
    """How much better the winner is than another contestant: a paired difference with its 95 % interval."""

    mean: Measured
    low: Measured
    high: Measured


class Confirmation(Config):
    """The objective of each contestant on fresh seeds, and the winner's advantage over the others."""

    winner: int
    """The winner's trial number."""
    num_samples: int
    """Pictures of each contestant."""
    values: dict[str, Measured]
    """winner, base and, unless they failed, defaults: the objective's value. The base samples as the winner does."""
    advantages: dict[str, Advantage]
    """Over the base and over the defaults."""


@dataclass(frozen=True)
class Contest:
    """A confirmation that is wanted: the study, the winner's number, and where everything is written."""

    spec: StudySpec
    winner: int

    @property
    def run(self) -> RunDir:
        """One directory per winner and number of seeds, so that a finished confirmation is found again."""
        return RunDir(self.spec.root / "confirm" / f"{self.winner:04d}-{self.spec.confirm_seeds}")

    @property
    def file(self) -> Path:
        """The confirmation."""
        return self.run.path / "confirmation.json"

    @property
    def picture(self) -> Path:
        """What tuning did, for people to look at: base, defaults and winner side by side, a row per prompt."""
        return self.run.path / "comparison.png"


def confirm(contest: Contest) -> Confirmation:
    """Judge the winner again, as a job of the study's launcher; at once if that was done before.

    Raises:
        LaunchError: The job ended without an answer.
    """
    if not contest.file.exists():
        _run_job(contest)
    found = read_confirmation(contest)
    if found is None:
        raise LaunchError(f"{contest.run.path}: got no answer; expected the winner's comparison; see {contest.run.log}")
    return found


def read_confirmation(contest: Contest) -> Confirmation | None:
    """The finished comparison, or None."""
    if not contest.file.exists():
        return None
    return Confirmation.model_validate_json(contest.file.read_text(encoding="utf-8"))


def _run_job(contest: Contest) -> None:
    spec, run = contest.spec, contest.run
    tree = {"study": spec.model_dump(mode="json"), "winner": contest.winner}
    text, digest = freeze(tree)
    write_atomically(run.trial, text)
    launcher = spec.launcher.alone()
    job = Job("orchestrator.confirm", (str(run.path), "--sha256", digest), run.path)
    job_id = launcher.find(job) or launcher.submit(job)
    try:
        while launcher.poll(job_id) is not JobState.ENDED:
            time.sleep(launcher.poll_seconds)
    finally:
        launcher.cancel(job_id)


def fresh_seeds(count: int) -> tuple[int, ...]:
    """Seeds that no trial's panel uses."""
    return tuple(range(_FRESH, _FRESH + count))


def _values(records: Sequence[Record], spec: StudySpec) -> dict[tuple[str, int], float]:
    """The objective of every picture by (prompt, seed)."""
    signs = spec.trial.evaluate.higher_is_better
    return {(record.prompt, record.seed): spec.objective.sample_values(record.values, signs)[0] for record in records}


def _judge(contest: Contest) -> Confirmation:
    """Inside the job: draw and score every contestant."""
    from evaluation.grid import draw_grid
    from evaluation.records import read_records
    from evaluation.statistics import estimate, paired_difference

    spec = contest.spec
    values: dict[str, dict[tuple[str, int], float]] = {}
    pictures: dict[tuple[str, str], Path] = {}
    for name, number in {"base": contest.winner, "defaults": 0, "winner": contest.winner}.items():
        run, trial = RunDir(contest.run.path / name), RunDir(spec.root / "trials" / f"{number:04d}")
        if not trial.result.exists():  # the defaults failed: there is nothing to compare with
            continue
        frozen = TrialSpec.model_validate(thaw(trial.trial))
        _draw(spec, frozen, trial.adapter if name != "base" else None, run)
        records = read_records(run.records)
        values[name] = _values(records, spec)
        pictures |= {(r.prompt, name): run.path / r.file for r in records if r.seed == _FRESH}
    draw_grid(pictures).save(contest.picture)
    gains = {name: paired_difference(values["winner"], panel) for name, panel in values.items() if name != "winner"}
    return Confirmation(
        winner=contest.winner,
        num_samples=len(values["winner"]),
        values={name: estimate(panel).mean for name, panel in values.items()},
        advantages={name: Advantage(mean=gain.mean, low=gain.low, high=gain.high) for name, gain in gains.items()},
    )


def _draw(spec: StudySpec, frozen: TrialSpec, adapter: Path | None, run: RunDir) -> None:
    from evaluation.evaluate import evaluate, open_scorers
    from trainers.train import build_accelerator

    accelerator = build_accelerator(frozen.train)
    model = frozen.train.load_trained(adapter, accelerator)
    config = frozen.evaluate.model_copy(update={"seeds": fresh_seeds(spec.confirm_seeds)})
    references = frozen.train.data.split().held_out
    scorers = open_scorers(config, references, model.device, spec.cache)
    with accelerator.autocast():
        evaluate(model, config, scorers, run)


def main(argv: Sequence[str] | None = None) -> int:
    """The job: `python -m orchestrator.confirm RUN_DIR --sha256 HASH`."""
    parser = argparse.ArgumentParser(prog="orchestrator.confirm", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--sha256", required=True, help="hash that trial.yaml must have")
    options = parser.parse_args(argv)
    tree = thaw(RunDir(options.run_dir).trial, options.sha256)
    contest = Contest(StudySpec.model_validate(tree["study"]), tree["winner"])
    write_atomically(contest.file, _judge(contest).model_dump_json(indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
