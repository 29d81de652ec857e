"""`submit`: a whole study as one job."""

from __future__ import annotations

import argparse

from orchestrator.command import add_study, add_trials, check, load, out
from trainers.errors import ConfigError

TEXT = "Run a whole study inside one job of its launcher; say it again to see how it stands and fetch what it wrote."
_SAID = {
    "submitted": "submitted; say the same to see how it stands",
    "queued": "waits for a machine",
    "running": "runs",
    "finished": "has ended",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_study(parser)
    add_trials(parser)
    text = "replace a value of the study in the job alone, for example launcher.gpus_per_trial=1; may be repeated"
    parser.add_argument("--inside", action="append", default=[], metavar="PATH=VALUE", help=text)
    parser.add_argument("--cancel", action="store_true", help="end the job; submitted again, it goes on")


def run(options: argparse.Namespace) -> int:
    """Submit, or look."""
    from orchestrator import inside

    series = load(options)
    if not series.is_single:
        raise ConfigError(f"{options.study}: got a file of several studies; expected one: a job holds one study")
    spec = check(series.members[0])
    if options.cancel:
        inside.cancel(spec)
        out.print(f"the job of {spec.name} is ended", highlight=False)
        return 0
    standing = inside.advance(spec, options.inside)
    out.print(f"{spec.name}: {_SAID[standing]}", highlight=False)
    path = inside.run_dir(spec).path / inside.FILE
    out.print(f"its trials: python -m orchestrator status {path}", soft_wrap=True, markup=False, highlight=False)
    return 0
