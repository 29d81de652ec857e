"""`move`: a study to another database."""

from __future__ import annotations

import argparse

from orchestrator.command import add_study, load, out

TEXT = "Move a study to another database, for example from SQLite to PostgreSQL."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_study(parser)
    parser.add_argument(
        "--to", required=True, metavar="URL", help="postgresql://user@host:5432/database or sqlite:////folder/file.db"
    )


def run(options: argparse.Namespace) -> int:
    """Copy, compare, and put the old file aside; of each study that was ever run."""
    from orchestrator.database import check_url
    from orchestrator.ledger import has_study
    from orchestrator.moving import move_study
    from orchestrator.storage import controller_lock, told
    from trainers.errors import ConfigError

    series = load(options)
    try:
        url = check_url(options.to)
    except ValueError as error:
        raise ConfigError(f"--to: {error}") from error
    for member in series.chosen:
        spec, _ = member.load()
        if series.is_single or has_study(spec):
            with told(spec.root), controller_lock(spec.root):
                count = move_study(spec, url)
            out.print(f"{count} trials of {spec.name} are moved", soft_wrap=True)
    out.print("from now on, say this in the study file:")
    out.print(f"storage: {url}", soft_wrap=True, markup=False, highlight=False)
    return 0
