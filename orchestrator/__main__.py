"""The command line: `python -m orchestrator COMMAND`."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import cast

from orchestrator.command import Command, err
from trainers.errors import ProjectError

_COMMANDS = ("run", "plan", "status", "best", "replay", "cancel", "submit", "move", "ui", "evaluate", "generate")
"""In the order of `--help`."""
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
"""What a disk says to a write, which names no file."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 for an answer of no, 2 for an error of the user's, 130 for Ctrl-C."""
    try:
        options = _parser().parse_args(argv)
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
    except OSError as error:
        if error.filename is None and error.errno not in _DISK:  # no file of the user's
            raise
        where = error.filename or "a file that was written"
        problem = f"{where}: got {error.strerror}; expected a file or folder that can be read and written"
        err.print(f"error: {ProjectError(problem)}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator",
        description="Hyperparameter search for diffusion fine-tuning.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    below = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in _COMMANDS:
        command = cast("Command", import_module(f"orchestrator.commands.{name}"))
        own = below.add_parser(name, help=command.TEXT, description=command.TEXT)
        command.add_arguments(own)
        own.set_defaults(command=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
