"""`ui`: a study in a browser."""

from __future__ import annotations

import argparse

from orchestrator.command import add_study, load, out

TEXT = "Show the study's tracker in a browser, on this machine only."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_study(parser)
    parser.add_argument("--port", type=int, default=5000, help="where to listen (default 5000)")


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C; several studies of a file are in one store, which opens with the first of them."""
    spec, _ = load(options).chosen[0].load()
    spec.tracker.serve(spec.name, spec.root, options.port, lambda line: out.print(line, soft_wrap=True))
    return 0
