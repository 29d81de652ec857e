"""The command line: `python -m orchestrator COMMAND`. Nothing but this module prints."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Never

from rich.console import Console
from rich.logging import RichHandler
from rich.syntax import Syntax
from rich.table import Table

from trainers.errors import ProjectError

if TYPE_CHECKING:
    from types import FrameType

    import optuna

    from orchestrator.plan import Estimate
    from orchestrator.spec import StudySpec

_EXAMPLES = """\
a first study, from start to end:
  python -m orchestrator plan studies/hpo.yaml          what would be computed, and whether it fits; starts nothing
  python -m orchestrator run studies/hpo.yaml           run it; after Ctrl-C or a crash, the same command goes on
  python -m orchestrator status studies/hpo.yaml        what each trial did, in another terminal if you like
  python -m orchestrator best studies/hpo.yaml          the winner: its parameters, scores and adapter
  python -m orchestrator ui studies/hpo.yaml            curves and pictures of all trials in a browser

change a study without editing it:
  python -m orchestrator run studies/hpo.yaml --set trial.train.steps=500 --set name=longer --trials 30
"""
_CANCEL_SECONDS = 60

_WIDTH_OF_FILES = 160
"""Columns of a table that goes to a file or a pipe."""

out = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)
err = Console(stderr=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 for an answer of no, 2 for an error of the user's, 130 for Ctrl-C."""
    options = _parser().parse_args(argv)
    try:
        return options.command(options)
    except ProjectError as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        err.print("stopped; the same command goes on from here")
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator",
        description="Hyperparameter search for diffusion fine-tuning.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        below = commands.add_parser(name, help=text, description=text)
        below.set_defaults(command=command)
        return below

    def add_study(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        below = add(name, command, text)
        below.add_argument("study", type=Path, metavar="STUDY", help="a study file, for example studies/hpo.yaml")
        below.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="PATH=VALUE",
            dest="sets",
            help="replace a value of the study, for example trial.seed=1; may be repeated",
        )
        return below

    run = add_study("run", _run, "Run a study to its end, or go on with it.")
    plan = add_study("plan", _plan, "Validate a study and show what it would do; start nothing.")
    for below in (run, plan):
        text = "counted trials in total; a larger number extends a finished study"
        below.add_argument("--trials", type=int, metavar="N", help=text)
    add_study("status", _status, "Show every trial: state, parameters, scores, duration, reason of failure.")
    add_study("best", _best, "Show the winner and write best_params.yaml.")
    text = "Run a finished trial again in a new folder and compare the scores; exit code 1 if they differ."
    add("replay", _replay, text).add_argument("trial_dir", type=Path, metavar="TRIAL_DIR", help="runs/NAME/trials/0007")
    add_study("cancel", _cancel, "End a study's controller and jobs; `run` goes on later.")
    ui = add_study("ui", _ui, "Show the study's tracker in a browser, on this machine only.")
    ui.add_argument("--port", type=int, default=5000, help="where to listen (default 5000)")
    return parser


def _load(options: argparse.Namespace) -> tuple[StudySpec, Callable[[], None]]:
    """The study, and the check of everything it needs."""
    from orchestrator.spec import load_study

    sets: list[str] = list(options.sets)
    if getattr(options, "trials", None) is not None:
        sets.append(f"limits.trials={options.trials}")
    spec, document = load_study(options.study, sets)

    def check() -> None:
        from orchestrator import plan

        plan.check(spec, document)

    return spec, check


def _run(options: argparse.Namespace) -> int:
    spec, check = _load(options)
    check()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)])
    from orchestrator.plan import check_fits
    from orchestrator.storage import controller_lock, open_study

    signal.signal(signal.SIGTERM, _interrupt)
    with controller_lock(spec.root):
        study = open_study(spec)
        check_fits(spec, _estimate(spec))
        _control(spec, study)
        if spec.confirm_seeds:
            _confirm(spec, study)
    return _best(options)


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


def _interrupt(_signal: int, _frame: FrameType | None) -> Never:
    raise KeyboardInterrupt


def _plan(options: argparse.Namespace) -> int:
    spec, check = _load(options)
    check()
    import yaml

    from orchestrator.plan import check_fits

    needed = _estimate(spec)
    frozen = yaml.safe_dump(spec.resolve(spec.defaults()).model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    out.print("first trial, the study's own defaults:", style="bold")
    out.print(Syntax(frozen, "yaml", background_color="default", word_wrap=True))
    table = Table(title="search space", title_justify="left")
    for column in ("path", "kind", "values", "first trial"):
        table.add_column(column)
    for path, value in spec.defaults().items():
        parameter = spec.search[path]
        values = ", ".join(f"{k}={v}" for k, v in parameter.model_dump(exclude={"kind"}, exclude_defaults=True).items())
        table.add_row(path, parameter.model_dump()["kind"], values, str(value))
    out.print(table)
    _print_estimate(spec, needed)
    check_fits(spec, needed)
    return 0


def _estimate(spec: StudySpec) -> Estimate:
    from orchestrator.ledger import read_trials
    from orchestrator.plan import estimate
    from orchestrator.tables import read_result

    trials = read_trials(spec) if (spec.root / "study.db").exists() else []
    results = [(trial.run.path, read_result(trial.run)) for trial in trials if trial.state == "COMPLETE"]
    counted = sum(trial.state in {"COMPLETE", "PRUNED"} for trial in trials)
    return estimate(spec, [(path, result) for path, result in results if result is not None], counted)


def _print_estimate(spec: StudySpec, needed: Estimate) -> None:
    from orchestrator.plan import human

    say, trial = partial(out.print, soft_wrap=True), spec.trial
    pictures = len(trial.evaluate.prompts) * len(trial.evaluate.seeds)
    weights = " + ".join(f"{weight:g} x {name}" for name, weight in spec.objective.weights_by_score().items())
    say(f"to compute: {needed.trials_left} of {spec.num_trials} trials, {spec.limits.parallel} at a time;", end=" ")
    say(f"each trains {trial.train.steps} steps of {trial.train.batch_size} examples,", end=" ")
    say(f"draws {pictures} pictures in {trial.evaluate.steps} steps and maximises {weights}")
    if needed.seconds_per_trial is None:
        say("time: unknown until the first trial has finished; `plan` measures it from then on")
    else:
        hours = needed.seconds_per_trial * needed.trials_left / spec.limits.parallel / 3600
        say(f"time: {needed.seconds_per_trial:.0f} s a trial so far, about {hours:.2g} h for the rest")
    say(f"disk: at most {human(needed.disk_bytes)} = {needed.disk_formula}, in {spec.root}")
    where = "device memory" if needed.on_gpu else "memory"
    say(f"{where} of each process: {human(needed.memory_bytes)} = {needed.memory_formula}")


def _status(options: argparse.Namespace) -> int:
    spec, _ = _load(options)
    from orchestrator.ledger import read_trials
    from orchestrator.tables import status_table

    out.print(status_table(spec, read_trials(spec)))
    return 0


def _best(options: argparse.Namespace) -> int:
    spec, _ = _load(options)
    from orchestrator.ledger import read_trials
    from orchestrator.tables import best_trial, write_best

    winner, value = best_trial(spec, read_trials(spec))
    path, content = write_best(spec, winner, value)
    out.print(f"trial {winner.number} is best: value {value:.6g}", style="bold")
    for name, chosen in content["params"].items():
        out.print(f"  {name}: {chosen:.4g}" if isinstance(chosen, float) else f"  {name}: {chosen}")
    for name, score in content["scores"].items():
        out.print(f"  {name}: {score['mean']:.4f} ± {score['standard_error']:.4f}")
    for line in _confirmed(spec, winner.number):
        out.print(line, soft_wrap=True, markup=False)
    for line in (f"adapter: {content['adapter']}", f"use it:  {content['use']}", f"written: {path}"):
        out.print(line, soft_wrap=True, markup=False)
    return 0


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


def _replay(options: argparse.Namespace) -> int:
    from orchestrator.replay import replay

    signal.signal(signal.SIGTERM, _interrupt)
    result = replay(options.trial_dir)
    for name, score in result.before.items():
        again = result.after[name].mean if name in result.after else None
        out.print(f"{name}: {score.mean!r} -> {again!r}", highlight=False)
    for name, (then, now) in result.changed_versions.items():
        out.print(f"{name} was {then} and is {now}", soft_wrap=True, highlight=False)
    out.print(
        f"{'equal' if result.is_equal else 'different'} scores; the repetition is in {result.run.path}", soft_wrap=True
    )
    return 0 if result.is_equal else 1


def _cancel(options: argparse.Namespace) -> int:
    spec, _ = _load(options)
    from orchestrator.controller import Controller
    from orchestrator.storage import controller_lock, end_controller, read_study

    study = read_study(spec)
    ended = end_controller(spec.root, _CANCEL_SECONDS)
    with controller_lock(spec.root):
        Controller(spec, study).stop()
    out.print(f"{'its controller and ' if ended else ''}all jobs of {spec.name} are ended; `run` goes on later")
    return 0


def _ui(options: argparse.Namespace) -> int:
    spec, _ = _load(options)
    spec.tracker.serve(spec.name, spec.root, options.port, lambda line: out.print(line, soft_wrap=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
