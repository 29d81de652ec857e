"""`best`: the winner of a study."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from orchestrator.command import add_study, load, out, say_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from orchestrator.spec import StudySpec

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
    """Print the winner, or the front of several values, and write `best_params.yaml`."""
    from orchestrator.ledger import read_trials
    from orchestrator.tables import best_trial, status_table, won, write_best

    trials = read_trials(spec)
    winners = won(spec, trials)
    if len(spec.objective.names) > 1:
        path, _ = write_best(spec, winners)
        out.print(status_table(spec, winners, f"{spec.name}: no trial is better than one of these in every value"))
        out.print(f"written: {path}", soft_wrap=True, markup=False)
        return
    winner, value = best_trial(spec, trials)
    path, content = write_best(spec, [winner])
    out.print(f"trial {winner.number} is best: value {value:.6g}", style="bold")
    for name, chosen in content["params"].items():
        out.print(f"  {name}: {chosen:.4g}" if isinstance(chosen, float) else f"  {name}: {chosen}")
    for name, score in content["scores"].items():
        out.print(f"  {name}: {score['mean']:.4f} ± {score['standard_error']:.4f}")
    for line in _confirmed(spec, winner.number):
        out.print(line, soft_wrap=True, markup=False)
    for line in (f"adapter: {content['adapter']}", f"use it:  {content['use']}", f"written: {path}"):
        out.print(line, soft_wrap=True, markup=False)


def _confirmed(spec: StudySpec, winner: int) -> Iterator[str]:
    """What fresh seeds said, if that was asked."""
    from orchestrator.confirm import Contest, read_confirmation

    contest = Contest(spec, winner)
    if found := read_confirmation(contest):
        yield f"on {found.num_samples} pictures with fresh seeds (95 % intervals):"
        for name, gain in found.advantages.items():
            values = f"{found.values['winner']:.4f} against {found.values[name]:.4f}"
            verdict = "better than" if gain.low > 0 else "worse than" if gain.high < 0 else "not clearly different from"
            yield f"  {verdict} the {name}: {gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f}), {values}"
        yield f"side by side: {contest.picture}"
