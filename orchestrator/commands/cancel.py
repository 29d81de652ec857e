"""`cancel`: end what a study runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from orchestrator.command import add_study, load, out

if TYPE_CHECKING:
    from orchestrator.spec import StudySpec

_CANCEL_SECONDS = 60

TEXT = "End a study's controller and jobs; `run` goes on later."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_study(parser)


def run(options: argparse.Namespace) -> int:
    """End them and wait for it; of several studies first what runs one after the other."""
    series = load(options)
    from orchestrator.ledger import has_study
    from orchestrator.storage import end_controller

    if not series.is_single and series.root.is_dir():
        end_controller(series.root, _CANCEL_SECONDS)
    for member in series.chosen:
        spec, _ = member.load()
        if series.is_single or has_study(spec):
            _cancel(spec)
    return 0


def _cancel(spec: StudySpec) -> None:
    from orchestrator.controller import Controller
    from orchestrator.ending import end_others
    from orchestrator.signals import undisturbed
    from orchestrator.storage import controller_lock, end_controller, read_study, told

    read_study(spec)  # which says so if there is none
    ended = end_controller(spec.root, _CANCEL_SECONDS)
    with told(spec.root), controller_lock(spec.root), undisturbed():
        Controller(spec, read_study(spec, is_held=True)).stop()
        end_others(spec.launcher, spec.root)
    out.print(f"{'its controller and ' if ended else ''}all jobs of {spec.name} are ended; `run` goes on later")
