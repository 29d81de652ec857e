"""Which trial really is the best? The few best of a study, its defaults and the untrained base on seeds no trial saw.

The largest of many noisy values is partly luck: the best few are scored again, on prompts of the panel with fresh
seeds, and the best there wins; the defaults too, if they are, but never the base. All draw the same (prompt, seed)
pairs: differences are paired.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.ending import run_to_end
from orchestrator.front import feasible
from orchestrator.launcher import Job
from orchestrator.lead import die_with_parent
from orchestrator.panels import picture_values
from orchestrator.spec import StudySpec, TrialSpec
from orchestrator.tables import best_trial
from orchestrator.tracker import Evidence
from orchestrator.views import run_dir
from trainers.config import Config
from trainers.errors import LaunchError, StorageError
from trainers.rundir import Measured, RunDir, freeze, read_json, thaw, write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from evaluation.statistics import Panel
    from orchestrator.tracker import TrialView


_FRESH = 1_000_003
"""Added to fresh seeds; trials use small ones."""


class Standing(Config):
    """How one contestant did on fresh seeds."""

    name: str
    """`trial 7`, `base` for the model before training, or `defaults` for the first trial if it is no candidate."""
    trial: int | None
    """Its number; null is the base, which samples as the first candidate does."""
    value: Measured
    """The objective."""
    difference: Measured
    """Its value minus the winner's on the same prompts and seeds; 0 for the winner, undefined without a value."""
    low: Measured
    """Lower end of the 95 % interval of the difference."""
    high: Measured
    num_undefined: int = 0
    """Pictures that it or the winner has no value for; the difference leaves them out, and each value its own."""

    @property
    def verdict(self) -> str:
        """Whether the winner is really better, in a few words."""
        if math.isnan(self.difference):
            return "not comparable"
        if self.high < 0:
            return "worse"
        return "better" if self.low > 0 else "not clearly different"


class Confirmation(Config):
    """The objective of each contestant on fresh seeds."""

    winner: int
    """Number of the trial that is the best there."""
    num_samples: int
    """Pictures of each contestant."""
    standings: tuple[Standing, ...]
    """Trials from the best to the worst on fresh seeds, then who cannot win.

    Those are trials without a value to compare, defaults that break a bound, and the base. Where no trial has a value,
    the best of the study stays the winner.
    """

    def evidence(self, contest: Contest) -> Evidence:
        """What trackers are told."""
        known = [one for one in self.standings if not math.isnan(one.value)]
        values = {one.trial: one.value for one in known if one.trial is not None}
        return Evidence(self.winner, values, (contest.file, contest.table, contest.picture))


@dataclass(frozen=True)
class Contest:
    """A confirmation that is wanted: the study, its best trials' numbers, and where everything is written."""

    spec: StudySpec
    candidates: tuple[int, ...]
    """From the best to the worst in the study."""
    defaults_can_win: bool
    """Whether the first trial was scored and keeps all bounds."""

    @property
    def run(self) -> RunDir:
        """One directory per candidates and number of seeds, so that a finished confirmation is found again."""
        names = "-".join(f"{number:04d}" for number in self.candidates)
        return RunDir(self.spec.root / "confirm" / f"{names}_{self.spec.confirm_seeds}")

    @property
    def file(self) -> Path:
        """The confirmation."""
        return self.run.path / "confirmation.json"

    @property
    def table(self) -> Path:
        """The same as a table: a line a contestant."""
        return self.run.path / "confirmation.csv"

    @property
    def picture(self) -> Path:
        """What tuning did, for people to look at: all contestants side by side, a row per prompt."""
        return self.run.path / "comparison.png"


def find_contest(spec: StudySpec, trials: Sequence[TrialView]) -> Contest:
    """The contest of the study's best trials as they are now.

    Raises:
        StorageError: No trial has been scored yet.
    """
    left, found = list(trials), [best_trial(spec, trials)[0]]
    while len(found) < spec.confirm_top:
        left.remove(found[-1])
        try:
            found.append(best_trial(spec, left)[0])
        except StorageError:
            break
    can_win = any(trial.number == 0 for _, trial in feasible(trials))
    return Contest(spec, tuple(trial.number for trial in found), can_win)


def winning_trial(spec: StudySpec, trials: Sequence[TrialView]) -> tuple[TrialView, float]:
    """The best trial on fresh seeds if that was asked, else in the study, and its value in the study.

    Raises:
        StorageError: No trial has been scored yet.
    """
    found = read_confirmation(find_contest(spec, trials))
    if found is None:
        return best_trial(spec, trials)
    return best_trial(spec, [trial for trial in trials if trial.number == found.winner])


def confirm(contest: Contest) -> Confirmation:
    """Judge the best trials again, as a job of the study's launcher; at once if that was done before.

    Raises:
        LaunchError: The job ended without an answer.
    """
    if not contest.file.exists():
        _run_job(contest)
    found = read_confirmation(contest)
    if found is None:
        raise LaunchError(
            f"{contest.run.path}: got no answer; expected the best trials compared; see {contest.run.log}"
        )
    return found


def read_confirmation(contest: Contest) -> Confirmation | None:
    """The finished comparison, or None."""
    return read_json(contest.file, Confirmation)


def _run_job(contest: Contest) -> None:
    spec, run = contest.spec, contest.run
    tree = {"study": spec.model_dump(mode="json"), "candidates": list(contest.candidates),
            "defaults_can_win": contest.defaults_can_win}  # fmt: skip
    text, digest = freeze(tree)
    write_atomically(run.trial, text)
    judged = tuple(run_dir(spec.root, number).path for number in {0, *contest.candidates})
    job = Job("orchestrator.confirm", (str(run.path), "--sha256", digest), run.path, reads=judged)
    run_to_end(spec.launcher.alone(), job)


def fresh_seeds(count: int) -> tuple[int, ...]:
    """Seeds that no trial's panel uses."""
    return tuple(range(_FRESH, _FRESH + count))


def _judge(contest: Contest) -> Confirmation:
    """Inside the job: draw and score every contestant."""
    from evaluation.grid import draw_grid
    from evaluation.records import read_records

    spec = contest.spec
    contestants: dict[str, int] = {f"trial {number}": number for number in contest.candidates}
    if 0 not in contest.candidates:
        contestants["defaults"] = 0
    contestants["base"] = contest.candidates[0]
    panels: dict[str, dict[tuple[str, int], float]] = {}
    pictures: dict[tuple[str, str], Path] = {}
    for name, number in contestants.items():
        run, trial = RunDir(contest.run.path / name.replace(" ", "-")), run_dir(spec.root, number)
        if not trial.result.exists():  # the defaults failed: there is nothing to compare with
            continue
        frozen = TrialSpec.model_validate(thaw(trial.trial))
        _draw(spec, frozen, trial.adapter if name != "base" else None, run)
        records = read_records(run.records)
        panels[name] = picture_values(spec, records)
        pictures |= {(r.prompt, name): run.path / r.file for r in records if r.seed == _FRESH}
    draw_grid(pictures).save(contest.picture)
    return stand(contest, panels)


def stand(contest: Contest, panels: Mapping[str, Panel]) -> Confirmation:
    """The standings of what was measured, by contestants' names: `trial N`, `defaults`, `base`."""
    from evaluation.statistics import estimate, paired_difference, rank_panels

    numbers: dict[str, int | None] = {f"trial {number}": number for number in contest.candidates}
    if contest.defaults_can_win and "defaults" in panels:
        numbers["defaults"] = 0
    able = _comparable({name: panels[name] for name in numbers})
    ranked = rank_panels(able) if able else {}
    first = next(iter(ranked), f"trial {contest.candidates[0]}")
    others = {name: panel for name, panel in panels.items() if name not in ranked}
    differences = ranked | {name: paired_difference(panel, panels[first]) for name, panel in others.items()}
    standings = tuple(
        Standing(
            name=name,
            trial=numbers.get(name, 0 if name == "defaults" else None),
            value=estimate(panels[name]).mean,
            difference=found.mean,
            low=found.low,
            high=found.high,
            num_undefined=found.num_undefined,
        )
        for name, found in differences.items()
    )
    winner = numbers[first]
    assert winner is not None
    return Confirmation(winner=winner, num_samples=len(panels[first]), standings=standings)


def _comparable(panels: Mapping[str, Panel]) -> dict[str, Panel]:
    """Those with a value for a (prompt, seed) in common; whoever has the fewest values is left out first."""
    known = {name: {key for key in panel if not math.isnan(panel[key])} for name, panel in panels.items()}
    left = sorted(panels, key=lambda name: -len(known[name]))
    while left and not set[tuple[str, int]].intersection(*(known[name] for name in left)):
        left.pop()
    return {name: panel for name, panel in panels.items() if name in left}


def _write_table(contest: Contest, found: Confirmation) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["contestant", "value", "minus_winner", "low", "high", "verdict", "undefined"])
    for one in found.standings:
        numbers = (one.value, one.difference, one.low, one.high)
        verdict = "winner" if one.trial == found.winner else one.verdict
        table.writerow([one.name, *(f"{number:.6f}" for number in numbers), verdict, one.num_undefined])
    write_atomically(contest.table, text.getvalue())


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
    die_with_parent(os.getppid())
    tree = thaw(RunDir(options.run_dir).trial, options.sha256)
    contest = Contest(StudySpec.model_validate(tree["study"]), tuple(tree["candidates"]), tree["defaults_can_win"])
    found = _judge(contest)
    _write_table(contest, found)
    write_atomically(contest.file, found.model_dump_json(indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
