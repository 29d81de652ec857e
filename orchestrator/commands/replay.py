"""`replay`: is a trial what its frozen configuration says?"""

from __future__ import annotations

import argparse
from pathlib import Path

from orchestrator.command import out

TEXT = "Run a finished trial again in a new folder and compare the scores; exit code 1 if they differ."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("trial_dir", type=Path, metavar="TRIAL_DIR", help="runs/NAME/trials/0007")


def run(options: argparse.Namespace) -> int:
    """Repeat the trial and print both scores."""
    from orchestrator.replay import replay
    from orchestrator.signals import interruptible

    with interruptible():
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
