"""`status`: a table of trials."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from orchestrator.command import add_study, load, out

if TYPE_CHECKING:
    from orchestrator.spec import StudySpec

TEXT = "Show every trial: state, parameters, scores, duration, reason of failure."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_study(parser)


def run(options: argparse.Namespace) -> int:
    """Print the table of each study."""
    series = load(options)
    from orchestrator.ledger import has_study

    for member in series.chosen:
        spec, _ = member.load()
        if series.is_single or has_study(spec):
            _show(spec)
        else:
            why = f"waits for {member.waits_for}" if member.waits_for else "not started"
            out.print(f"{member.name}: {why}", soft_wrap=True, markup=False)
    return 0


def _show(spec: StudySpec) -> None:
    from orchestrator.budget import reached, read_usage
    from orchestrator.ledger import read_trials
    from orchestrator.panels import NOTES_FILE
    from orchestrator.tables import failure_lines, status_table

    trials = read_trials(spec)
    out.print(status_table(spec, trials))
    usage = read_usage(spec.root)
    out.print(f"used: {usage.seconds / 3600:.3g} h, of jobs {usage.device_seconds / 3600:.3g} h", highlight=False)
    if why := reached(spec, trials, usage):
        out.print(f"no more trials are started: {why}", soft_wrap=True, markup=False, highlight=False)
    for line in failure_lines(trials):
        out.print(line, soft_wrap=True, markup=False, highlight=False)
    if (notes := spec.root / NOTES_FILE).exists():
        out.print(notes.read_text(encoding="utf-8").rstrip(), soft_wrap=True, markup=False)
