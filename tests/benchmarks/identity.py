"""Whether people are drawn who look like their photo, by pixel truth: `python -m tests.benchmarks.identity TRIAL`.

People that no training picture shows: one photo of each is the reference; prompts ask for another shirt, background and
place. Three models draw the same pictures on fresh seeds: the base, which is told the prompt alone, PhotoMaker as it
was loaded, and PhotoMaker as the trial trained it. Four truths, and
an opinion:

- portrait: how right the whole picture is (face, hair, shirt, background), as in `tests.benchmarks.learned`: 0 to 1;
- face: root mean square difference of the colours (0 to 255) inside the face from those it should have, at the best of
  27 placements near the box;
- recognised: whether that person fits better there than seven others with the same hair. Only skin, eyes and the face's
  width tell them apart, and no prompt says those; chance is one in eight;
- cosine: what the study's own score would say, the cosine of a face embedder between picture and photo; found: in how
  many pictures it finds a face at all;
- kept: plain things that have nothing to do with people, as in `tests.benchmarks.learned`.

How good a face can be at all is said beside them: the right picture through the autoencoder and back. Differences are
paired; intervals are 95 % over people. Results: `tests/benchmarks/results/learned_photomaker.md`, png.
"""

import argparse
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from evaluation.grid import draw_grid
from evaluation.statistics import estimate, paired_difference
from orchestrator.provenance import versions
from orchestrator.spec import TrialSpec
from tests.benchmarks.learned import RESULTS, Panel, plain_scenes
from trainers.backbone import Model
from trainers.data.transforms import open_picture
from trainers.face import FaceEmbedder
from trainers.guidance import SamplingConfig
from trainers.methods.photomaker import PhotoMakerConfig
from trainers.miniature.people import Person
from trainers.miniature.pictures import to_unit
from trainers.miniature.portraits import Portrait, crowd, photo, somebody
from trainers.miniature.truth import compare
from trainers.miniature.world import Placement, Scene
from trainers.prompt import Prompt, Request
from trainers.rundir import RunDir, thaw
from trainers.sampling import generate
from trainers.train import build_accelerator

NEW, LINE_UP, SHOWN = 24, 8, 6
SEEDS = (1001, 1002)
"""That no study's panel uses."""
ROWS = {
    "portrait": "right picture, 0 to 1",
    "face": "error of the face, of 255",
    "recognised": "recognised among eight",
    "cosine": "embedder's cosine, of faces found",
    "found": "faces found",
    "kept": "plain things, 0 to 1",
}
_SEED = 4712
"""Of people that nobody has trained on, and no setting was chosen by."""
_WHO = ("base", "PhotoMaker", "trained")


@dataclass(frozen=True)
class Case:
    """A picture that is asked for, and people it might show."""

    prompt: Prompt
    """With somebody's photo."""
    portrait: Portrait
    """As it should be."""
    others: tuple[Person, ...]
    """With the same hair."""

    @property
    def words(self) -> Prompt:
        """The prompt for a model that is shown nobody."""
        return Prompt(text=self.portrait.caption())

    @cached_property
    def expected(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of the one asked for, then of the others: pictures [k, 64, 64, 3], where their faces are [k, 64, 64, 1]."""
        return [self._around(person) for person in (self.portrait.person, *self.others)]

    def _around(self, person: Person) -> tuple[np.ndarray, np.ndarray]:
        worn, place = self.portrait.person, self.portrait.placement
        shown = replace(person, shirt=worn.shirt, glasses=worn.glasses)
        steps = (-1, 0, 1)
        portraits = [
            Portrait(
                shown,
                self.portrait.background,
                Placement(place.x + 0.025 * x, place.y + 0.025 * y, place.radius * (1 + 0.08 * size)),
            )
            for x, y, size in product(steps, steps, steps)
        ]
        pictures = np.stack([np.asarray(one.draw()) for one in portraits])
        return pictures, np.stack([np.asarray(one.face_mask()) for one in portraits])[..., None]


def cases(folder: Path) -> list[Case]:
    """New people, their photos in `folder`."""
    folder.mkdir()
    found, said = list[Case](), set[str]()
    for number, person in enumerate(crowd(NEW, _SEED)):
        rng = random.Random(f"new/{number}")
        shown, path = photo(person, rng), folder / f"new{number:02d}.png"
        shown.draw().save(path)
        others: list[Person] = []
        while len(others) < LINE_UP - 1:
            other = somebody(rng, person)
            if (other.skin, other.eyes) not in {(one.skin, one.eyes) for one in (person, *others)}:
                others.append(other)
        asked = photo(person, rng)
        while asked.caption() in said:
            asked = photo(person, rng)
        said.add(asked.caption())
        prompt = Prompt(text=asked.caption("img"), image=path, image_box=shown.box, box=asked.box)
        found.append(Case(prompt, asked, tuple(others)))
    return found


def misfits(image: np.ndarray, case: Case) -> list[float]:
    """How far the face is from that of the person asked for, and then from the others'."""
    found: list[float] = []
    for pictures, faces in case.expected:
        inside = faces / np.float32(255)
        errors = (inside * (pictures - image.astype(np.float32)) ** 2).sum((1, 2, 3)) / inside.sum((1, 2, 3)) / 3
        found.append(float(errors.min()) ** 0.5)
    return found


@dataclass(frozen=True)
class Judged:
    """What one model drew."""

    truths: dict[str, Panel]
    pictures: dict[str, Path]
    """The first seed's, by the prompt with the photo."""


def judge(
    model: Model, told: Mapping[Prompt, Case], sampling: SamplingConfig, embedder: FaceEmbedder, folder: Path
) -> Judged:
    """Draw everything, and measure it.

    Args:
        model: Draws.
        told: Which case each prompt asks for.
        sampling: How pictures are drawn.
        embedder: Has an opinion on faces.
        folder: Gets pictures.
    """
    folder.mkdir()
    kept = plain_scenes()
    truths: dict[str, Panel] = {name: {} for name in ROWS}
    pictures: dict[str, Path] = {}
    for sample in generate(model, [Request(prompt, seed) for prompt in (*told, *kept) for seed in SEEDS], sampling):
        pixels = np.array(sample.image)
        if sample.prompt in kept:
            truths["kept"][str(sample.prompt), sample.seed] = _whole(pixels, kept[sample.prompt])
            continue
        case = told[sample.prompt]
        key, errors = (str(case.prompt), sample.seed), misfits(pixels, case)
        truths["portrait"][key] = _whole(pixels, case.portrait.scene)
        truths["face"][key] = errors[0]
        truths["recognised"][key] = float(errors[0] == min(errors))
        truths["cosine"][key] = cosine = _cosine(embedder, sample.image, case)
        truths["found"][key] = float(not math.isnan(cosine))
        if sample.seed == SEEDS[0]:
            pictures[key[0]] = folder / f"{len(pictures)}.png"
            sample.image.save(pictures[key[0]])
    return Judged(truths, pictures)


def _cosine(embedder: FaceEmbedder, image: Image.Image, case: Case) -> float:
    assert case.prompt.image is not None
    drawn, shown = embedder.find(image), embedder.find(open_picture(case.prompt.image), case.prompt.image_box)
    if drawn is None or shown is None:
        return math.nan
    return float(torch.nn.functional.cosine_similarity(drawn.embedding, shown.embedding, dim=0))


def _whole(pixels: np.ndarray, scene: Scene) -> float:
    return compare(to_unit(torch.from_numpy(pixels).permute(2, 0, 1)[None]), scene)[0].whole


@torch.no_grad()
def ceiling(backbone: Any, asked: Sequence[Case]) -> tuple[float, float]:
    """Mean error of faces that are right but for the autoencoder, and how often they are recognised."""
    errors: list[list[float]] = []
    for case in asked:
        pixels = to_unit(torch.from_numpy(np.array(case.portrait.draw())).permute(2, 0, 1)[None])
        moments = backbone.encode_image(pixels)
        back = backbone.decode(backbone.sample_latents(moments, torch.zeros_like(moments.mean)))[0]
        errors.append(misfits(((back.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy(), case))
    return float(np.mean([one[0] for one in errors])), float(np.mean([one[0] == min(one) for one in errors]))


def report(trial: Path) -> str:
    """Judge a trial; writes the table and the pictures, and returns the table."""
    spec = TrialSpec.model_validate(thaw(RunDir(trial).trial))
    config = spec.train
    assert isinstance(config, PhotoMakerConfig)
    accelerator = build_accelerator(config)
    sampling = SamplingConfig.model_validate(spec.evaluate.model_dump(include=set(SamplingConfig.model_fields)))
    with tempfile.TemporaryDirectory() as name, accelerator.autocast():
        folder = Path(name)
        asked = cases(folder / "people")  # noise is a function of prompts, and those name a photo's folder
        base = (config.draw_on or config.backbone).load(accelerator.device, config.frozen_dtype())
        assert config.faces is not None
        shown, embedder = {case.prompt: case for case in asked}, config.faces.open(accelerator.device)
        found = {
            "base": judge(base, {case.words: case for case in asked}, sampling, embedder, folder / "base"),
            "PhotoMaker": judge(config.load_trained(None, accelerator), shown, sampling, embedder, folder / "before"),
            "trained": judge(
                config.load_trained(RunDir(trial).adapter, accelerator), shown, sampling, embedder, folder / "after"
            ),
        }
        best = ceiling(base, asked)
        _draw_sheet(asked[:SHOWN], found, folder).save(RESULTS / "learned_photomaker.png")
    table = _table(found)
    used = versions()
    text = (
        f"# photomaker: learnt and kept\n\n{table}\n\n"
        f"Right pictures through the autoencoder and back: error of the face {best[0]:.1f}, recognised {best[1]:.3f}."
        "\n\n"
        "![photo, base, PhotoMaker, trained, as it should be](learned_photomaker.png)\n\n"
        f"{NEW} new people, {len(SEEDS)} seeds each; {config.steps} steps of {config.batch_size}; two CPU cores; "
        f"torch {used['torch']}, diffusers {used['diffusers']}. `tests/benchmarks/identity.py` explains the truths.\n\n"
        "    python -m orchestrator run studies/photomaker.yaml --trials 1\n"
        "    python -m tests.benchmarks.identity runs/photomaker/trials/0000\n"
    )
    (RESULTS / "learned_photomaker.md").write_text(text, encoding="utf-8")
    return table


def _draw_sheet(asked: Sequence[Case], found: Mapping[str, Judged], folder: Path) -> Image.Image:
    pictures: dict[tuple[str, str], Path] = {}
    for number, case in enumerate(asked):
        row, right = case.portrait.caption("img"), folder / f"right{number}.png"
        assert case.prompt.image is not None
        case.portrait.draw().save(right)
        pictures[row, "photo"] = case.prompt.image
        pictures |= {(row, who): found[who].pictures[str(case.prompt)] for who in _WHO}
        pictures[row, "as it should be"] = right
    return draw_grid(pictures)


def _table(found: Mapping[str, Judged]) -> str:
    lines = [
        "| pixel truth | base | PhotoMaker | trained | trained - PhotoMaker (95 %) | trained - base (95 %) |",
        "| --- | --: | --: | --: | --- | --- |",
    ]
    for what, title in ROWS.items():
        panels = [found[who].truths[what] for who in _WHO]
        means = "".join(f" {estimate(panel).mean:.3f} |" for panel in panels)
        gains = [paired_difference(panels[2], panel) for panel in (panels[1], panels[0])]
        differences = "".join(f" {gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}) |" for gain in gains)
        lines.append(f"| {title} |{means}{differences}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", type=Path, help="a finished trial's directory")
    print(report(parser.parse_args().trial))


if __name__ == "__main__":
    main()
