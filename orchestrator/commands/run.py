"""`run`: a study from wherever it is to its end."""

from __future__ import annotations

import argparse
import logging
import signal
from typing import TYPE_CHECKING

from rich.logging import RichHandler

from orchestrator.command import add_study, add_trials, err, interrupt, load
from orchestrator.commands import best

if TYPE_CHECKING:
    import optuna

    from orchestrator.spec import StudySpec

TEXT = "Run a study to its end, or go on with it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_study(parser)
    add_trials(parser)


def run(options: argparse.Namespace) -> int:
    """Ask, train, score and tell until the study is finished, then compare the winner."""
    spec, check = load(options)
    check()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)])
    from orchestrator.plan import check_fits, estimate_rest
    from orchestrator.storage import controller_lock, open_study, told

    signal.signal(signal.SIGTERM, interrupt)
    with told(spec.root), controller_lock(spec.root):
        study = open_study(spec)
        check_fits(spec, estimate_rest(spec))
        _control(spec, study)
        if spec.confirm_seeds:
            _confirm(spec, study)
    best.show(spec)
    return 0


def _confirm(spec: StudySpec, study: optuna.Study) -> None:
    from orchestrator.confirm import Contest, confirm
    from orchestrator.tables import best_trial
    from orchestrator.views import trial_views

    winner, _ = best_trial(spec, trial_views(spec, study))
    err.print(f"comparing trial {winner.number} with base and defaults on {spec.confirm_seeds} fresh seeds a prompt")
    confirm(Contest(spec, winner.number))


def _control(spec: StudySpec, study: optuna.Study) -> None:
    from orchestrator.controller import Controller
    from orchestrator.display import Display
    from orchestrator.replay import STUDY_FILE
    from orchestrator.views import study_view
    from trainers.rundir import write_atomically

    write_atomically(spec.root / STUDY_FILE, study_view(spec, study).study_yaml)
    with Display(err) as display:
        Controller(spec, study, [display.update]).run()
