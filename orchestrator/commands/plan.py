"""`plan`: a study before it starts."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from rich.syntax import Syntax
from rich.table import Table

from orchestrator.command import add_study, add_trials, check, load, out, say_name

if TYPE_CHECKING:
    from orchestrator.plan import Estimate
    from orchestrator.series import Member
    from orchestrator.spec import StudySpec

TEXT = "Validate a study and show what it would do; start nothing."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_study(parser)
    add_trials(parser)


def run(options: argparse.Namespace) -> int:
    """Show the first trial, the search space and the cost, of each study if there are several."""
    series = load(options)
    specs = [check(member) for member in series.chosen]
    for member, spec in zip(series.chosen, specs, strict=True):
        say_name(series, member.name)
        if member.waits_for:
            out.print(f"waits for {member.waits_for}: what it takes from there is not known yet", soft_wrap=True)
        if len(series.chosen) == 1:
            _show_first(spec)
        _show(_with_adapter(member, spec))
    return 0


def _with_adapter(member: Member, spec: StudySpec) -> StudySpec:
    """A study that waits for another one's adapter will train nothing."""
    if not (member.waits_for and member.source and member.source.adapter):
        return spec
    trial = spec.trial.model_copy(update={"adapter": member.waits_for})
    return spec.model_copy(update={"trial": trial})


def _show_first(spec: StudySpec) -> None:
    from orchestrator.yaml import dump

    frozen = dump(spec.resolve(spec.defaults()).model_dump(mode="json"))
    out.print("first trial, the study's own defaults:", style="bold")
    out.print(Syntax(frozen, "yaml", background_color="default", word_wrap=True))


def _show(spec: StudySpec) -> None:
    from orchestrator.beginning import find_beginning
    from orchestrator.ledger import has_study
    from orchestrator.plan import check_fits, estimate_rest

    needed = estimate_rest(spec)
    table = Table(title="search space", title_justify="left")
    for column in ("path", "kind", "values", "first trial"):
        table.add_column(column)
    for path, value in spec.defaults().items():
        parameter = spec.search[path]
        options = parameter.model_dump(exclude={"kind"}).items()
        values = ", ".join(f"{name}={one}" for name, one in options if one is not None and one is not False)
        table.add_row(path, parameter.model_dump()["kind"], values, str(value))
    if spec.search:
        out.print(table)
    for note in find_beginning(spec).notes if not has_study(spec) else ():
        out.print(note, soft_wrap=True, markup=False, highlight=False)
    _print_estimate(spec, needed)
    check_fits(spec, needed)


def _maximised(spec: StudySpec) -> str:
    sums = [" + ".join(f"{weight:g} x {name}" for name, weight in p.items()) for p in spec.objective.parts().values()]
    bounds = {name: bound.model_dump(exclude_none=True) for name, bound in spec.objective.bounds().items()}
    kept = [f"{name} {kind} {limit:g}" for name, bound in bounds.items() for kind, limit in bound.items()]
    return " and ".join(sums) + (f", subject to {', '.join(kept)}" if kept else "")


def _print_estimate(spec: StudySpec, needed: Estimate) -> None:
    from orchestrator.plan import human

    say, trial = partial(out.print, soft_wrap=True), spec.trial
    pictures = len(trial.evaluate.all_prompts) * len(trial.evaluate.seeds)
    say(f"to compute: {needed.trials_left} of {spec.num_trials} trials, {spec.limits.parallel} at a time;", end=" ")
    training = f"trains {trial.train.steps} steps of {trial.train.batch_size} examples"
    if trial.adapter:
        say(f"nothing is trained: each takes the adapter in {trial.adapter},", end=" ")
    elif spec.shares_training:
        say(f"the first {training}, unless that was done before; all take that adapter, and each", end=" ")
    else:
        say(f"each {training},", end=" ")
    say(f"draws {pictures} pictures in {trial.evaluate.steps} steps and maximises {_maximised(spec)}")
    if needed.seconds_per_trial is None:
        say("time: unknown until the first trial has finished; `plan` measures it from then on")
    else:
        hours = needed.seconds_per_trial * needed.trials_left / spec.limits.parallel / 3600
        say(f"time: {needed.seconds_per_trial:.0f} s a trial so far, about {hours:.2g} h for the rest")
    say(f"disk: at most {human(needed.disk_bytes)} = {needed.disk_formula}, in {spec.root}")
    where = "device memory" if needed.on_gpu else "memory"
    say(f"{where} of each process: {human(needed.memory_bytes)} = {needed.memory_formula}")
