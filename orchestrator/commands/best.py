"""`best`: the winner of a study."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from orchestrator.command import add_study, load, out, say_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from orchestrator.spec import StudySpec
    from orchestrator.tracker import TrialView

TEXT = "Show the winner and write best_params.yaml."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_study(parser)


def run(options: argparse.Namespace) -> int:
    """Print the winner of each study, and write the tables and strips of all of them together."""
    series = load(options)
    if series.is_single:
        show(series.members[0].load()[0])
        return 0
    from orchestrator.ledger import has_study
    from orchestrator.summary import write_summary

    for member in series.chosen:
        spec, _ = member.load()
        say_name(series, member.name)
        if has_study(spec):
            show(spec)
        else:
            out.print(f"waits for {member.waits_for}" if member.waits_for else "not started", soft_wrap=True)
    for file in write_summary(series):
        out.print(f"written: {file}", soft_wrap=True, markup=False)
    return 0


def show(spec: StudySpec) -> None:
    """Print the winner, on fresh seeds if those were asked, or the front of values; write `best_params.yaml`."""
    from orchestrator.confirm import winning_trial
    from orchestrator.ledger import read_trials
    from orchestrator.tables import status_table, won, write_best

    trials = read_trials(spec)
    winners = won(spec, trials)
    if len(spec.objective.names) > 1:
        said, _ = write_best(spec, winners)
        out.print(status_table(spec, winners, f"{spec.name}: no trial is better than one of these in every value"))
        out.print(said, soft_wrap=True, markup=False)
        return
    winner, value = winning_trial(spec, trials)
    said, content = write_best(spec, [winner])
    out.print(f"trial {winner.number} is best: value {value:.6g}", style="bold")
    for name, chosen in content["params"].items():
        out.print(f"  {name}: {chosen:.4g}" if isinstance(chosen, float) else f"  {name}: {chosen}")
    for name, score in content["scores"].items():
        out.print(f"  {name}: {score['mean']:.4f} ± {score['standard_error']:.4f}")
    for line in _confirmed(spec, trials):
        out.print(line, soft_wrap=True, markup=False)
    for key in ("adapter", "draw", "use"):
        if key in content:
            out.print(f"{key + ':':8} {content[key]}", soft_wrap=True, markup=False)
    out.print(said, soft_wrap=True, markup=False)


def _confirmed(spec: StudySpec, trials: Sequence[TrialView]) -> Iterator[str]:
    """What fresh seeds said, if that was asked."""
    from orchestrator.confirm import find_contest, read_confirmation

    contest = find_contest(spec, trials)
    if found := read_confirmation(contest):
        in_study = {trial.number: trial.values[0] for trial in trials if trial.values}
        yield f"on {found.num_samples} pictures with fresh seeds (differences from the winner, 95 % intervals):"
        for one in found.standings:
            before = f" ({in_study[one.trial]:.4f} in the study)" if one.trial is not None else ""
            gap = f"{one.difference:+.4f} ({one.low:+.4f} to {one.high:+.4f}), {one.verdict}"
            gap = one.verdict if math.isnan(one.difference) else gap
            value = "no value" if math.isnan(one.value) else f"{one.value:.4f}"
            lost = f" ({one.num_undefined} pictures without a value left out)" if one.num_undefined else ""
            yield f"  {one.name}: {value}{before}: {'wins' if one.trial == found.winner else gap}{lost}"
            if one.trial == found.winner and math.isnan(one.value):
                yield "  no trial has a value on fresh seeds: the best of the study stays"
            if one.trial is None and one.verdict == "better":
                yield "  no trial is better than the model before training: widen the search, or train differently"
        yield f"the same as a table: {contest.table}; side by side: {contest.picture}"
