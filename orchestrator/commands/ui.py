"""`ui`: a study in a browser."""

from __future__ import annotations

import argparse

from orchestrator.command import add_study, load, out

TEXT = "Show the study's tracker in a browser, on this machine only."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_study(parser)
    parser.add_argument("--port", type=_port, default=5000, help="where to listen (default 5000)")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number from 0 to {2**16 - 1}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C; several studies of a file are in one store, which opens with the first of them."""
    spec, _ = load(options).chosen[0].load()
    spec.tracker.serve(spec.name, spec.root, options.port, lambda line: out.print(line, soft_wrap=True))
    return 0
