"""`generate`: pictures from a trial, an adapter, or a model as it was."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.command import out

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
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="each prompt is drawn with each")
    parser.add_argument("--scale", type=float, default=1.0, help="how strongly the adapter acts (default 1)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        dest="sets",
        help="change how pictures are drawn, for example evaluate.guidance.scale=3 or evaluate.scheduler=euler",
    )
    parser.add_argument("--output", type=Path, default=Path("generated"), help="where pictures are written")


def run(options: argparse.Namespace) -> int:
    """Draw, name each picture by its prompt and seed, and lay all of them out on one sheet."""
    trial, adapter = _source(options)
    files = _files(options, trial)
    trial.train.backbone.check()
    trial.evaluate.check_model(trial.train.backbone)
    # Torch is loaded only now that all that can be wrong with names is known.
    from evaluation.grid import draw_grid
    from trainers.sampling import generate
    from trainers.train import build_accelerator

    accelerator = build_accelerator(trial.train)
    model = trial.train.load_trained(adapter, accelerator)
    options.output.mkdir(parents=True, exist_ok=True)
    with accelerator.autocast(), model.adapter_scale(options.scale):
        for request, sample in zip(files, generate(model, list(files), trial.evaluate), strict=True):
            sample.image.save(options.output / files[request])
    pictures = {(str(one.prompt), f"seed {one.seed}"): options.output / file for one, file in files.items()}
    draw_grid(pictures).save(options.output / _GRID)
    what = f"the adapter in {adapter} at scale {options.scale:g}" if adapter else "the untrained model"
    out.print(f"{len(files)} pictures with {what}: {options.output}, side by side in {options.output / _GRID}",
              soft_wrap=True, markup=False)  # fmt: skip
    return 0


def _source(options: argparse.Namespace) -> tuple[TrialSpec, Path | None]:
    """What is drawn with: a trial, and the adapter's folder if there is one."""
    from orchestrator.sources import read_trial
    from orchestrator.spec import load_study
    from trainers.errors import ConfigError
    from trainers.rundir import RunDir

    adapter: Path | None = options.adapter and options.adapter.resolve()
    folder = options.source.resolve()
    if (trial := read_trial(folder, options.sets)) is None:
        if folder.is_dir():
            raise ConfigError(f"{options.source}: got no trial.yaml in this folder; expected a trial's directory")
        study, _ = load_study(options.source, [f"trial.{change}" for change in options.sets])
        trial = study.trial
    elif adapter is None and not options.base:
        adapter = RunDir(folder).adapter
    if adapter is not None and not adapter.is_dir():
        raise ConfigError(f"{adapter}: got no such folder; expected an adapter; `--base` draws without one")
    if adapter is None and options.scale != 1:
        raise ConfigError(f"got --scale {options.scale:g} without an adapter; expected one, or no scale")
    return trial, adapter


def _files(options: argparse.Namespace, trial: TrialSpec) -> Mapping[Request, str]:
    """Every picture, prompt after prompt, and the name of its file."""
    from evaluation.config import MAX_SEED
    from evaluation.evaluate import name_files
    from trainers.errors import ConfigError
    from trainers.prompt import Prompt

    texts: list[str] = list(options.prompt)
    if options.prompts is not None:
        if not options.prompts.is_file():
            raise ConfigError(f"{options.prompts}: got no such file; expected prompts, one a line")
        texts += [line.strip() for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    given: tuple[Prompt, ...] = tuple(Prompt(text=text) for text in dict.fromkeys(texts)) or trial.evaluate.prompts
    seeds = tuple(dict.fromkeys(options.seeds or trial.evaluate.seeds))
    if wrong := [seed for seed in seeds if not 0 <= seed < MAX_SEED]:
        raise ConfigError(f"got --seeds {wrong[0]}; expected whole numbers from 0 to {MAX_SEED - 1}")
    return {request: Path(file).name for request, file in name_files(given, seeds).items()}
