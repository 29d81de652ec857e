"""What commands share: where they print, and how they are given a study."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.console import Console

if TYPE_CHECKING:
    from orchestrator.series import Member, Series
    from orchestrator.spec import StudySpec

_WIDTH_OF_FILES = 160
"""Columns of a table that goes to a file or a pipe."""

out = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)
err = Console(stderr=True)


class Command(Protocol):
    """What a module of `orchestrator.commands` holds; the module's name is the command's. Light to import."""

    TEXT: str
    """One sentence or two for `--help`."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare what the command takes."""
        ...

    def run(self, options: argparse.Namespace) -> int:
        """Do it; the exit code is 0, or 1 for an answer of no. Raises ProjectError for an error of the user's."""
        ...


def add_study(parser: argparse.ArgumentParser) -> None:
    """Let a command take a study file and changes to it."""
    parser.add_argument("study", type=Path, metavar="STUDY", help="a study file, for example studies/hpo.yaml")
    add_sets(parser, "replace a value of the study, for example trial.seed=1; may be repeated")
    text = "of a file with several studies, this one: its name, stage or subject; given twice, both must fit"
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help=text)


def add_sets(parser: argparse.ArgumentParser, text: str) -> None:
    """Let a command change what a file says."""
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="sets", help=text)


def add_trials(parser: argparse.ArgumentParser) -> None:
    """Let a command take another number of trials."""
    text = "counted trials in total; a larger number extends a finished study"
    parser.add_argument("--trials", type=int, metavar="N", help=text)


def load(options: argparse.Namespace) -> Series:
    """The studies that a command was given: one, unless the file has subjects or stages.

    Raises:
        ConfigError: What is wrong with the study file, in one line.
    """
    from dataclasses import replace

    from orchestrator.complaints import did_you_mean
    from orchestrator.series import load_series
    from trainers.errors import ConfigError

    sets: list[str] = list(options.sets)
    if getattr(options, "trials", None) is not None:
        sets.append(f"limits.trials={options.trials}")
    series = replace(load_series(options.study, sets), only=tuple(options.only))
    if not series.chosen:
        known = [name for member in series.members for name in (member.name, member.stage, member.subject) if name]
        only = " and ".join(options.only)
        raise ConfigError(
            f"--only: got {only}; expected a study of {options.study}; {did_you_mean(options.only[0], known)}"
        )
    return series


def check(member: Member) -> StudySpec:
    """The study, when everything that it needs is there.

    Raises:
        ConfigError: What is wrong, in one line.
        StorageError: The output cannot be written.
    """
    from orchestrator import plan

    spec, document = member.load()
    plan.check(spec, document)
    return spec


def say_name(series: Series, name: str) -> None:
    """Head what follows by the study that it is of, where there are several."""
    if not series.is_single:
        out.print(name, style="bold")
