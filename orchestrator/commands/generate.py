"""`generate`: pictures from a trial, an adapter, or a model as it was."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.command import add_sets, out

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.spec import TrialSpec
    from trainers.prompt import Prompt, Request

TEXT = "Draw pictures with what a trial trained, with any adapter of its kind, or with the untrained model."
_GRID = "grid.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    text = "a trial's directory, such as runs/hpo/trials/0007, or a study file for its untrained model"
    parser.add_argument("source", type=Path, metavar="SOURCE", help=text)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--adapter", type=Path, metavar="FOLDER", help="draw with this adapter instead of the trial's")
    which.add_argument("--base", action="store_true", help="draw with the untrained model")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="one or more; else the panel's")
    text = "lines, evaluation_prompts.json, or prompts_and_classes.txt"
    parser.add_argument("--prompts", type=Path, metavar="FILE", help=text)
    text = "whose prompts of FILE are drawn, into a folder of that name, as `evaluate` reads it"
    parser.add_argument("--subject", metavar="NAME", help=text)
    parser.add_argument("--token", metavar="WORD", help="the rare word that stands before the subject in its prompts")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="each prompt is drawn with each")
    parser.add_argument("--scale", type=float, default=1.0, help="how strongly the adapter acts (default 1)")
    text = "change how pictures are drawn, for example evaluate.guidance.scale=3 or evaluate.scheduler=euler"
    add_sets(parser, text)
    parser.add_argument("--output", type=Path, default=Path("generated"), help="where pictures are written")


def run(options: argparse.Namespace) -> int:
    """Draw, name each picture by its prompt and seed, and lay all of them out on one sheet."""
    from orchestrator.origin import find_origin
    from trainers.errors import ConfigError

    origin = find_origin(options.source, options.sets, options.adapter, base=options.base)
    if origin.adapter is None and origin.checkpoint is None and options.scale != 1:
        raise ConfigError(f"got --scale {options.scale:g} without an adapter; expected one, or no scale")
    files = _files(options, origin.trial)
    origin.check([one.prompt for one in files])
    # Torch is loaded only now that all that can be wrong with names is known.
    from evaluation.grid import draw_grid
    from trainers.sampling import generate
    from trainers.train import build_accelerator

    accelerator = build_accelerator(origin.trial.train)
    model, what = origin.load(accelerator)
    folder: Path = options.output / options.subject if options.subject else options.output
    folder.mkdir(parents=True, exist_ok=True)
    with accelerator.autocast(), model.adapter_scale(options.scale):
        for request, sample in zip(files, generate(model, list(files), origin.trial.evaluate), strict=True):
            sample.image.save(folder / files[request])
    pictures = {(str(one.prompt), f"seed {one.seed}"): folder / file for one, file in files.items()}
    sheet = options.output / (f"{options.subject}_{_GRID}" if options.subject else _GRID)
    draw_grid(pictures).save(sheet)
    scale = "" if options.scale == 1 else f" at scale {options.scale:g}"
    out.print(f"{len(files)} pictures with {what}{scale}: {folder}, side by side in {sheet}",
              soft_wrap=True, markup=False)  # fmt: skip
    return 0


def _files(options: argparse.Namespace, trial: TrialSpec) -> Mapping[Request, str]:
    """Every picture, prompt after prompt, and the name of its file."""
    from evaluation.evaluate import name_files
    from trainers.errors import ConfigError
    from trainers.prompt import MAX_SEED, Prompt

    if "" in options.prompt:
        raise ConfigError("got an empty --prompt; expected words")
    told = [*(Prompt(text=text) for text in options.prompt), *_book(options)]
    given = tuple(dict.fromkeys(told)) or trial.evaluate.prompts
    seeds = tuple(dict.fromkeys(options.seeds or trial.evaluate.seeds))
    if wrong := [seed for seed in seeds if not 0 <= seed < MAX_SEED]:
        raise ConfigError(f"got --seeds {wrong[0]}; expected whole numbers from 0 to {MAX_SEED - 1}")
    return {request: Path(file).name for request, file in name_files(given, seeds).items()}


def _book(options: argparse.Namespace) -> tuple[Prompt, ...]:
    """What the file of prompts says, of the subject if it has several."""
    from evaluation.subjects import map_folders, read_book
    from trainers.errors import ConfigError

    if options.prompts is None:
        if options.subject or options.token:
            raise ConfigError("got --subject or --token without --prompts; expected the file whose prompts name it")
        return ()
    book = read_book(options.prompts, options.token)
    if not book.subjects:
        if options.subject or options.token:
            raise ConfigError(f"{options.prompts}: names no subjects; expected one that does, or no --subject, --token")
        return book.prompts
    if options.subject is None:
        known = ", ".join(book.subjects)
        raise ConfigError(f"{options.prompts}: has prompts of several subjects; name one of {known} with --subject")
    found = map_folders([options.subject], book.subjects)
    if found.unmapped:
        raise ConfigError(f"--subject {options.subject}: {found.unmapped[options.subject]}")
    return book.subjects[found.mapped[0].subject]
