"""`status`: a table of trials."""

from __future__ import annotations

import argparse

from orchestrator.command import add_study, load, out

TEXT = "Show every trial: state, parameters, scores, duration, reason of failure."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_study(parser)


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    spec, _ = load(options)
    from orchestrator.ledger import read_trials
    from orchestrator.panels import NOTES_FILE
    from orchestrator.tables import failure_lines, status_table

    trials = read_trials(spec)
    out.print(status_table(spec, trials))
    for line in failure_lines(trials):
        out.print(line, soft_wrap=True, markup=False, highlight=False)
    if (notes := spec.root / NOTES_FILE).exists():
        out.print(notes.read_text(encoding="utf-8").rstrip(), soft_wrap=True, markup=False)
    return 0
