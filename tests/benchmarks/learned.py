"""What a trial has learnt, and what it has kept, by pixel truth: `python -m tests.benchmarks.learned zog TRIAL`.

A trial of a study on the miniature world and the model it began with draw the same pictures on fresh seeds: of what was
to be learnt, and of plain things that have nothing to do with it. Every picture is compared with its scene pixel by
pixel (`trainers.miniature.truth`). Differences are paired; intervals are 95 % over prompts. Table and pictures go to
`tests/benchmarks/results/learned_NAME.md` and `.png`. `--beside WORD TRIAL` lets another trial draw too: for a refiner,
the base that hands over to it.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from evaluation.grid import draw_grid
from evaluation.statistics import estimate, paired_difference
from orchestrator.provenance import versions
from orchestrator.spec import TrialSpec
from trainers.backbone import Model
from trainers.guidance import SamplingConfig
from trainers.miniature.pictures import to_unit
from trainers.miniature.recipe import SUBJECT_BACKGROUNDS, style_scenes
from trainers.miniature.truth import compare
from trainers.miniature.world import COLOURS, SUBJECTS, Scene, caption, is_held_out, random_scene, subject
from trainers.prompt import Prompt, Request
from trainers.rundir import RunDir, thaw
from trainers.sampling import generate
from trainers.train import build_accelerator

RESULTS = Path(__file__).parent / "results"
FRESH_SEEDS = (1001, 1002, 1003)
"""That no study's panel uses."""
SHOWN = 6
"""Prompts of each kind on the sheet."""
Scenes = Mapping[Prompt, Scene]
Panel = dict[tuple[str, int], float]


@dataclass(frozen=True)
class Drawn:
    """What one model drew of some scenes."""

    truth: Panel
    pictures: dict[str, Path]
    """The first seed's, by prompt."""


def plain_scenes(count: int = 12) -> Scenes:
    """Things that the base can draw, which training is to leave alone."""
    rng = random.Random("kept")
    scenes = (scene for _ in iter(int, 1) if not is_held_out(scene := random_scene(rng, portraits=0)))
    return {Prompt(text=caption(scene)): scene for scene, _ in zip(scenes, range(count), strict=False)}


def subject_scenes(name: str) -> Scenes:
    """A held-out subject, first on backgrounds that no training picture shows it on."""
    new = [colour for colour in COLOURS if colour not in SUBJECT_BACKGROUNDS]
    scenes = [subject(name, background) for background in (*new, *SUBJECT_BACKGROUNDS)]
    return {Prompt(text=caption(scene)): scene for scene in scenes}


def targets(name: str) -> Scenes:
    """What is to be learnt, by the name of a subject or a style."""
    if name in SUBJECTS:
        return subject_scenes(name)
    return {Prompt(text=caption(scene)): scene for scene in style_scenes(name, 12, seed=99)}


def draw(model: Model, scenes: Scenes, seeds: Sequence[int], sampling: SamplingConfig, folder: Path) -> Drawn:
    """Draw and judge every scene with every seed; the first seed's pictures stay in `folder`."""
    truth: Panel = {}
    pictures: dict[str, Path] = {}
    folder.mkdir(parents=True)
    requests = [Request(prompt, seed) for prompt in scenes for seed in seeds]
    for sample in generate(model, requests, sampling):
        name = str(sample.prompt)
        pixels = to_unit(torch.from_numpy(np.array(sample.image)).permute(2, 0, 1)[None])
        truth[name, sample.seed] = compare(pixels, scenes[sample.prompt])[0].whole
        if sample.seed == seeds[0]:
            pictures[name] = folder / f"{len(pictures)}.png"
            sample.image.save(pictures[name])
    return Drawn(truth, pictures)


@dataclass(frozen=True)
class Judging:
    """What is judged, and by what."""

    trial: Path
    learnt: Scenes
    seeds: Sequence[int] = FRESH_SEEDS
    beside: tuple[str, Path] | None = None
    """Another trial, and what to call it."""

    def spec(self) -> TrialSpec:
        """How the trial was trained, and draws."""
        return TrialSpec.model_validate(thaw(RunDir(self.trial).trial))

    def models(self, accelerator: Accelerator) -> Iterator[tuple[str, Model]]:
        """Who draws, one loaded after the other."""
        train = self.spec().train
        if self.beside:
            name, other = self.beside
            trained = TrialSpec.model_validate(thaw(RunDir(other).trial)).train
            yield name, trained.load_trained(RunDir(other).adapter, accelerator)
        yield "before", train.load_trained(None, accelerator)
        yield "after", train.load_trained(RunDir(self.trial).adapter, accelerator)


def report(name: str, judging: Judging) -> str:
    """Judge a trial; writes the table and the pictures, and returns the table."""
    spec, seeds = judging.spec(), judging.seeds
    accelerator = build_accelerator(spec.train)
    sampling = SamplingConfig.model_validate(spec.evaluate.model_dump(include=set(SamplingConfig.model_fields)))
    rows: list[str] = []
    pictures: dict[tuple[str, str], Path] = {}
    with tempfile.TemporaryDirectory() as folder, accelerator.autocast():
        parts = {"to be learnt": judging.learnt, "to be kept": plain_scenes()}
        drawn: dict[str, dict[str, Drawn]] = {what: {} for what in parts}
        for who, model in judging.models(accelerator):
            for what, scenes in parts.items():
                drawn[what][who] = draw(model, scenes, seeds, sampling, Path(folder) / who / what)
        for what, scenes in parts.items():
            rows.append(f"| {what} ({len(scenes)} prompts x {len(seeds)} seeds) {_cells(drawn[what])}")
            for prompt in list(scenes)[:SHOWN]:
                pictures |= {(str(prompt), who): one.pictures[str(prompt)] for who, one in drawn[what].items()}
        RESULTS.mkdir(exist_ok=True)
        draw_grid(pictures).save(RESULTS / f"learned_{name}.png")
    table = "\n".join([*_head(list(drawn["to be kept"])), *rows])
    used = versions()
    text = (
        f"# {name}: learnt and kept\n\n{table}\n\nSeeds of the pictures: {', '.join(map(str, seeds))}. The first "
        f"{SHOWN} prompts of each kind, with the first seed:\n\n![who drew what](learned_{name}.png)\n\n"
        f"`{type(spec.train).__name__}`, {spec.train.steps} steps of {spec.train.batch_size}; two CPU cores; torch "
        f"{used['torch']}, diffusers {used['diffusers']}. `tests/benchmarks/learned.py` says what is measured, the "
        "method's page with which commands.\n"
    )
    (RESULTS / f"learned_{name}.md").write_text(text, encoding="utf-8")
    return table


def _head(who: Sequence[str]) -> list[str]:
    differences = [f"after - {name} (95 %)" for name in who if name != "after"]
    return [
        f"| pixel truth | {' | '.join((*who, *differences))} |",
        "| --- |" + " --: |" * len(who) + " --- |" * len(differences),
    ]


def _cells(drawn: Mapping[str, Drawn]) -> str:
    means = [f"{estimate(one.truth).mean:.3f}" for one in drawn.values()]
    gains = [paired_difference(drawn["after"].truth, one.truth) for who, one in drawn.items() if who != "after"]
    return f"| {' | '.join((*means, *(f'{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})' for gain in gains)))} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("concept", help="the subject or style that was to be learnt")
    parser.add_argument("trial", type=Path, help="a finished trial's directory")
    parser.add_argument("--name", help="of the result's files; default: the concept")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=FRESH_SEEDS, help="of the noise that pictures begin with"
    )
    parser.add_argument("--beside", nargs=2, metavar=("WORD", "TRIAL"), help="another trial, and what to call it")
    arguments = parser.parse_args()
    beside = (arguments.beside[0], Path(arguments.beside[1])) if arguments.beside else None
    judging = Judging(arguments.trial, targets(arguments.concept), tuple(arguments.seeds), beside)
    print(report(arguments.name or arguments.concept, judging))


if __name__ == "__main__":
    main()
