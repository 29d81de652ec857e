"""Whether people are drawn who look like their photo, by pixel truth: `python -m tests.benchmarks.identity TRIAL`.

People that no training picture shows: one photo of each is the reference; prompts ask for another shirt, background and
place. The untrained PhotoMaker (before) and a trial's (after) draw the same pictures on fresh seeds. Three truths:

- face: root mean square difference of the colours (0 to 255) inside the face from those it should have, at the best of
  27 placements near the box;
- recognised: whether that person fits better there than seven others with the same hair. Only skin, eyes and the face's
  width tell them apart, and no prompt says those; chance is one in eight;
- kept: plain things that have nothing to do with people, as in `tests.benchmarks.learned`.

Differences are paired; intervals are 95 % over prompts. Results: `tests/benchmarks/results/learned_photomaker.md`, png.
"""

import argparse
import random
import tempfile
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from evaluation.grid import draw_grid
from evaluation.statistics import estimate, paired_difference
from orchestrator.provenance import versions
from orchestrator.spec import TrialSpec
from tests.benchmarks.learned import RESULTS, Panel, plain_scenes
from trainers.backbone import Model
from trainers.guidance import SamplingConfig
from trainers.miniature.people import Person
from trainers.miniature.pictures import to_unit
from trainers.miniature.portraits import Portrait, crowd, photo, somebody
from trainers.miniature.truth import compare
from trainers.miniature.world import Placement
from trainers.prompt import Prompt, Request
from trainers.rundir import RunDir, thaw
from trainers.sampling import generate
from trainers.train import build_accelerator

NEW, PER_PERSON, LINE_UP = 12, 2, 8
SEEDS = (1001, 1002)
"""That no study's panel uses."""
ROWS = {"face": "error of the face", "recognised": "recognised among eight", "kept": "plain things"}
_SEED = 4711
"""Of people that nobody has trained on."""


@dataclass(frozen=True)
class Case:
    """A picture that is asked for, and people it might show."""

    portrait: Portrait
    """As it should be."""
    others: tuple[Person, ...]
    """With the same hair."""


def cases(folder: Path) -> dict[Prompt, Case]:
    """New people, their photos in `folder`."""
    found: dict[Prompt, Case] = {}
    for number, person in enumerate(crowd(NEW, _SEED)):
        rng = random.Random(f"new/{number}")
        shown, path = photo(person, rng), folder / f"new{number:02d}.png"
        shown.draw().save(path)
        others: list[Person] = []
        while len(others) < LINE_UP - 1:
            other = somebody(rng, person)
            if (other.skin, other.eyes) not in {(one.skin, one.eyes) for one in (person, *others)}:
                others.append(other)
        for _ in range(PER_PERSON):
            asked = photo(person, rng)
            text = asked.caption("img")
            prompt = Prompt(text=text, image=path, image_box=shown.box, box=asked.box)
            found[prompt] = Case(asked, tuple(others))
    return found


def misfits(image: np.ndarray, case: Case) -> list[float]:
    """How far the face is from that of the person asked for, and then from the others'."""
    return [_misfit(image, case.portrait, person) for person in (case.portrait.person, *case.others)]


def _misfit(image: np.ndarray, asked: Portrait, person: Person) -> float:
    best, place = float("inf"), asked.placement
    shown = replace(person, shirt=asked.person.shirt, glasses=asked.person.glasses)
    steps = (-1, 0, 1)
    for x, y, size in product(steps, steps, steps):
        moved = Placement(place.x + 0.025 * x, place.y + 0.025 * y, place.radius * (1 + 0.08 * size))
        portrait = Portrait(shown, asked.background, moved)
        inside = np.asarray(portrait.face_mask(), np.float32)[:, :, None] / 255
        squares = inside * (np.asarray(portrait.draw(), np.float32) - image) ** 2
        best = min(best, float(squares.sum() / inside.sum() / 3))
    return best**0.5


@dataclass(frozen=True)
class Judged:
    """What one model drew."""

    truths: dict[str, Panel]
    pictures: dict[str, Path]
    """The first seed's, by prompt."""


def judge(model: Model, told: dict[Prompt, Case], sampling: SamplingConfig, folder: Path) -> Judged:
    """Draw everything, and measure it."""
    kept = plain_scenes()
    truths: dict[str, Panel] = {"face": {}, "recognised": {}, "kept": {}}
    pictures: dict[str, Path] = {}
    for sample in generate(model, [Request(prompt, seed) for prompt in (*told, *kept) for seed in SEEDS], sampling):
        key = (str(sample.prompt), sample.seed)
        pixels = np.array(sample.image)
        if sample.prompt in kept:
            unit = to_unit(torch.from_numpy(pixels).permute(2, 0, 1)[None])
            truths["kept"][key] = compare(unit, kept[sample.prompt])[0].whole
            continue
        errors = misfits(pixels.astype(np.float32), told[sample.prompt])
        truths["face"][key] = errors[0]
        truths["recognised"][key] = float(errors[0] == min(errors))
        if sample.seed == SEEDS[0]:
            pictures[key[0]] = folder / f"{len(pictures)}.png"
            sample.image.save(pictures[key[0]])
    return Judged(truths, pictures)


def report(trial: Path) -> str:
    """Judge a trial; writes the table and the pictures, and returns the table."""
    spec = TrialSpec.model_validate(thaw(RunDir(trial).trial))
    accelerator = build_accelerator(spec.train)
    sampling = SamplingConfig.model_validate(spec.evaluate.model_dump(include=set(SamplingConfig.model_fields)))
    with tempfile.TemporaryDirectory() as name, accelerator.autocast():
        folder = Path(name)
        told = cases(folder)
        found: dict[str, Judged] = {}
        for who, adapter in (("before", None), ("after", RunDir(trial).adapter)):
            (folder / who).mkdir()
            found[who] = judge(spec.train.load_trained(adapter, accelerator), told, sampling, folder / who)
        rows = [_row(what, found["before"].truths[what], found["after"].truths[what]) for what in ROWS]
        pictures: dict[tuple[str, str], Path] = {}
        for prompt in list(told)[::PER_PERSON][:6]:
            assert prompt.image is not None
            pictures[str(prompt), "photo"] = prompt.image
            pictures |= {(str(prompt), who): found[who].pictures[str(prompt)] for who in found}
        RESULTS.mkdir(exist_ok=True)
        draw_grid(pictures).save(RESULTS / "learned_photomaker.png")
    table = "\n".join(["| pixel truth | before | after | difference (95 %) |", "| --- | --: | --: | --- |", *rows])
    used = versions()
    text = (
        f"# photomaker: learnt and kept\n\n{table}\n\n![photo, before, after](learned_photomaker.png)\n\n"
        f"{NEW} new people, {PER_PERSON} prompts each, {len(SEEDS)} seeds; {spec.train.steps} steps of "
        f"{spec.train.batch_size}; two CPU cores; torch {used['torch']}, diffusers {used['diffusers']}. "
        "`python -m tests.benchmarks.identity TRIAL` explains the truths.\n"
    )
    (RESULTS / "learned_photomaker.md").write_text(text, encoding="utf-8")
    return table


def _row(what: str, before: Panel, after: Panel) -> str:
    gain = paired_difference(after, before)
    values = (estimate(before).mean, estimate(after).mean, gain.mean, gain.low, gain.high)
    return f"| {ROWS[what]} " + "| {:.3f} | {:.3f} | {:+.3f} ({:+.3f} to {:+.3f}) |".format(*values)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", type=Path, help="a finished trial's directory")
    print(report(parser.parse_args().trial))


if __name__ == "__main__":
    main()
