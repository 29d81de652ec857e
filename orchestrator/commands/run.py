"""`run`: a study from wherever it is to its end."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from rich.logging import RichHandler

from orchestrator.command import add_study, add_trials, check, err, load, out, say_name
from orchestrator.commands import best
from trainers.errors import ConfigError, ProjectError

if TYPE_CHECKING:
    import optuna

    from orchestrator.series import Member, Series
    from orchestrator.spec import StudySpec

TEXT = "Run a study to its end, or go on with it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_study(parser)
    add_trials(parser)


def run(options: argparse.Namespace) -> int:
    """Ask, train, score and tell until the study is finished, then compare the winner; of each study in turn."""
    from orchestrator.signals import interruptible

    with interruptible():
        series = load(options)
        for member in series.chosen:
            check(member)
        handlers = [RichHandler(console=err, show_path=False)]
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
        if series.is_single:
            _run(series.members[0])
        else:
            _run_all(series)
    return 0


def _run_all(series: Series) -> None:
    """One study after the other; one that cannot end does not keep those from running that need nothing of it.

    Raises:
        StudyStoppedError: Some have not ended.
    """
    from orchestrator.failures import StudyStoppedError
    from orchestrator.storage import controller_lock
    from orchestrator.summary import write_summary

    failed: list[str] = []
    with controller_lock(series.root):
        for member in series.chosen:
            say_name(series, member.name)
            try:
                _run(member)
            except ProjectError as error:
                failed.append(member.name)
                err.print(f"{member.name}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        for file in write_summary(series):
            out.print(f"written: {file}", soft_wrap=True, markup=False)
    if failed:
        raise StudyStoppedError(
            f"{series.root}: got {len(failed)} of {len(series.chosen)} studies that have not ended, for the reasons "
            f"above: {', '.join(failed)}"
        )


def _run(member: Member) -> None:
    from orchestrator.plan import check_fits, estimate_rest
    from orchestrator.storage import controller_lock, open_study, told

    if member.waits_for:
        raise ConfigError(f"{member.name}: waits for {member.waits_for}, which has not ended; run it first")
    spec = check(member)  # again: with what it takes from a study that has ended by now
    with told(spec.root), controller_lock(spec.root):
        study = open_study(spec)
        check_fits(spec, estimate_rest(spec))
        _control(spec, study)
        _hand_on(spec, study)
    best.show(spec)


def _hand_on(spec: StudySpec, study: optuna.Study) -> None:
    """Judge the best once more, and say for other studies who won; several values have a front, and no winner."""
    from orchestrator.confirm import winning_trial
    from orchestrator.series import Winner, ending, write_winner
    from orchestrator.views import trial_views

    if len(spec.objective.names) > 1:
        write_winner(spec.root, Winner(study=spec.name, trial=None, value=None, params={}, ending=ending(spec)))
        return
    if spec.confirm_seeds:
        _confirm(spec, study)
    winner, value = winning_trial(spec, trial_views(spec, study))
    found = Winner(study=spec.name, trial=winner.number, value=value, params=dict(winner.params), ending=ending(spec))
    write_winner(spec.root, found)


def _confirm(spec: StudySpec, study: optuna.Study) -> None:
    from orchestrator.confirm import confirm, find_contest
    from orchestrator.views import study_view, trial_views
    from trainers.errors import TrackerError

    trials = trial_views(spec, study)
    contest = find_contest(spec, trials)
    names = ", ".join(map(str, contest.candidates))
    err.print(f"comparing the best ({names}) with defaults and base on {spec.confirm_seeds} fresh seeds a prompt")
    found = confirm(contest)
    try:
        spec.tracker.mirror(study_view(spec, study, found.evidence(contest)), trials)
    except TrackerError as error:
        err.print(f"{error}; run the study again to send what fresh seeds said", style="yellow", markup=False)


def _control(spec: StudySpec, study: optuna.Study) -> None:
    from orchestrator.controller import Controller
    from orchestrator.display import Display
    from orchestrator.replay import STUDY_FILE
    from orchestrator.series import WINNER
    from orchestrator.signals import pause
    from orchestrator.views import study_view
    from trainers.rundir import write_atomically

    (spec.root / WINNER).unlink(missing_ok=True)  # until it has ended again: it may be extended
    write_atomically(spec.root / STUDY_FILE, study_view(spec, study).study_yaml)
    pause(0)  # before anything is started: a signal may have come while the study was read
    with Display(err) as display:
        Controller(spec, study, [display.update]).run()
