"""Does a label stream learn what captions do not say? Pairs of the miniature world, judged by pixels.

    python -m tests.benchmarks.ip_adapter --rates 0.003 0.01 0.02    # otherwise as studies/ip_adapter.yaml says
    python -m tests.benchmarks.ip_adapter --data                      # draws studies/data/shapes again

Captions name the background alone ("a picture on a blue background"); label vectors say shape and colour, one number
each. A fifth of the combinations is in no training picture: the panel asks for those, each on one background. `truth`
is the geometric mean of how well object and background match (`trainers/miniature/truth.py`); intervals are paired
bootstraps over prompts against the untrained base. Results go to tests/benchmarks/results/.
"""

import argparse
import csv
import platform
import random
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from evaluation.encoders import ClipEncoders
from evaluation.metrics.clip import ClipText
from evaluation.statistics import paired_difference
from orchestrator.spec import load_study
from trainers.backbone import Model
from trainers.cache import Cache
from trainers.guidance import ClassifierFree, SamplingConfig
from trainers.methods.ip_adapter import IpAdapterConfig
from trainers.miniature.pictures import to_unit
from trainers.miniature.truth import compare
from trainers.miniature.world import (
    COLOURS,
    SHAPES,
    SIZE,
    Placement,
    Scene,
    caption,
    contact_sheet,
    draw,
    random_placement,
    with_article,
)
from trainers.prompt import Prompt, Request, Sample
from trainers.rundir import RunDir
from trainers.sampling import generate
from trainers.train import build_accelerator, train

ROOT = Path(__file__).parents[2]
DATA = ROOT / "studies" / "data" / "shapes"
RESULTS = Path(__file__).parent / "results"
WEIGHTS = ROOT / "trainers" / "miniature" / "weights"
HELD_OUT = 24
SEEDS = (0,)
PICTURES_PER_COMBINATION = 2
SAMPLING = SamplingConfig(
    resolution=SIZE, steps=20, scheduler="ddim", guidance=ClassifierFree(scale=3.0), batch_size=16
)


def combinations() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(shape, colour) pairs to train on, and those to ask for; every shape and colour is in both."""
    rng = random.Random(0)
    everything = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    while True:
        rng.shuffle(everything)
        asked, trained = everything[:HELD_OUT], everything[HELD_OUT:]
        if {shape for shape, _ in asked} == set(SHAPES) and {colour for _, colour in asked} == set(COLOURS):
            return trained, asked


def label(shape: str, colour: str) -> tuple[float, ...]:
    """One number for each shape, then one for each colour."""
    return tuple(float(name == said) for names, said in ((SHAPES, shape), (COLOURS, colour)) for name in names)


def text(background: str) -> str:
    """What captions say."""
    return f"a picture on {with_article(background)} background"


def panel() -> dict[Prompt, Scene]:
    """What is asked for, and what it looks like: combinations that no training picture shows."""
    rng = random.Random(1)
    found: dict[Prompt, Scene] = {}
    for shape, colour in combinations()[1]:
        background = rng.choice([name for name in COLOURS if name != colour])
        scene = Scene(background, shape, "solid", colour)
        found[Prompt(text=text(background), shows=caption(scene), label=label(shape, colour))] = scene
    return found


def unrelated() -> dict[Prompt, Scene]:
    """Ordinary prompts without a label."""
    rng = random.Random(2)
    found: dict[Prompt, Scene] = {}
    while len(found) < 12:
        colour, background = rng.sample(list(COLOURS), 2)
        scene = Scene(background, rng.choice(SHAPES), "solid", colour)
        found[Prompt(text=caption(scene))] = scene
    return found


def draw_data() -> None:
    """Draw training pictures and the combinations to ask for, each with its table."""
    DATA.mkdir(parents=True, exist_ok=True)
    rng = random.Random(3)
    trained = [
        Scene(rng.choice([name for name in COLOURS if name != colour]), shape, "solid", colour)
        for shape, colour in combinations()[0] * PICTURES_PER_COMBINATION
    ]
    for table, scenes in (("pairs", trained), ("asked", panel().values())):
        with (DATA / f"{table}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["image", "caption", "label"])
            for number, scene in enumerate(scenes):
                name = f"{table}_{number:03d}.png"
                draw(scene, random_placement(rng)).save(DATA / name, optimize=True)
                said = " ".join(f"{value:g}" for value in label(scene.shape, scene.colour))
                rows.writerow([name, text(scene.background), said])


def truths(samples: Iterable[Sample], scenes: dict[Prompt, Scene]) -> dict[tuple[str, int], float]:
    """The pixel truth of every sample."""
    found = {}
    for sample in samples:
        pixels = torch.from_numpy(np.array(sample.image)).permute(2, 0, 1)[None]
        found[str(sample.prompt), sample.seed] = compare(to_unit(pixels), scenes[sample.prompt])[0].whole
    return found


def drawn(model: Model, scenes: dict[Prompt, Scene]) -> list[Sample]:
    """One picture of every prompt and seed."""
    return list(generate(model, [Request(prompt, seed) for seed in SEEDS for prompt in scenes], SAMPLING))


def similarity(samples: Iterable[Sample]) -> float:
    """CLIP-T against what is asked for: the study's objective."""
    metric = ClipText(model=WEIGHTS / "clip")
    with tempfile.TemporaryDirectory() as cache:
        scorer = metric.open(ClipEncoders(torch.device("cpu"), Cache(Path(cache))), [])
        return float(np.mean(scorer.values(list(samples))))


def study() -> IpAdapterConfig:
    """What the study trains by default."""
    config = load_study(ROOT / "studies" / "ip_adapter.yaml")[0].trial.train
    assert isinstance(config, IpAdapterConfig)
    return config


def main() -> None:
    """Train at every rate, judge, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="store_true", help="draw the data set and stop")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates; default the study's own")
    arguments = parser.parse_args()
    if arguments.data:
        draw_data()
        return
    config = study()
    accelerator = build_accelerator(config)
    wanted, others = panel(), unrelated()
    base = drawn(config.load_trained(None, accelerator), wanted)
    rows, strips = [row("base", base, base, wanted) + " |"], [base]
    kept = ""
    for rate in arguments.rates or [config.optimizer.lr]:
        changed = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": rate})})
        with tempfile.TemporaryDirectory() as folder:
            run, started = RunDir(Path(folder) / "run"), time.process_time()
            model = train(changed, run, 0, Path(folder) / "cache", accelerator).method.model
            seconds = time.process_time() - started
            samples = drawn(model, wanted)
            rows.append(row(f"{rate:g}", samples, base, wanted) + f" {seconds:.0f} |")
            strips.append(samples)
            print(rows[-1], flush=True)
            if rate == config.optimizer.lr:
                kept = unrelated_line(drawn(model, others), drawn(config.load_trained(None, accelerator), others))
    write(rows, kept, strips, config)


def row(name: str, samples: list[Sample], base: list[Sample], scenes: dict[Prompt, Scene]) -> str:
    """One line of the table."""
    truth, theirs = truths(samples, scenes), truths(base, scenes)
    gain = paired_difference(truth, theirs)
    interval = "| " if samples is base else f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}) | "
    mean = np.mean(list(truth.values()))
    return f"| {name} | {mean:.3f} | {interval}{similarity(samples):.3f} |"


def unrelated_line(samples: list[Sample], base: list[Sample]) -> str:
    """Whether prompts without a label are drawn as before."""
    same = sum(np.array_equal(np.array(a.image), np.array(b.image)) for a, b in zip(samples, base, strict=True))
    return f"Of {len(base)} pictures of ordinary prompts without a label, {same} equal the base's to the bit."


def write(rows: list[str], kept: str, strips: list[list[Sample]], config: IpAdapterConfig) -> None:
    """The report, and a picture: first row what was asked for, then the base, then one row a rate."""
    RESULTS.mkdir(exist_ok=True)
    asked = [draw(scene, Placement()) for scene in panel().values()]
    pictures = [[sample.image for sample in strip[: len(asked)]] for strip in strips]
    sheet = contact_sheet([asked, *pictures])
    sheet.save(RESULTS / "ip_adapter.png", optimize=True)
    lines = [
        "# A label stream learns what captions do not say",
        "",
        f"`python -m tests.benchmarks.ip_adapter` on {platform.machine()}, torch {torch.__version__};",
        f"{config.steps} steps of batch {config.batch_size}. Asked for are {HELD_OUT} combinations of shape and colour",
        "that are in no training picture.",
        "",
        "![what is asked for, the base, and each rate](ip_adapter.png)",
        "",
        "*First row: what the labels say. Second: the base, which cannot hear them. Then one row a rate.*",
        "",
        "| rate | truth | gain over the base (95 % over prompts) | clip_t | CPU seconds of training |",
        "| --- | --: | --: | --: | --: |",
        *rows,
        "",
        kept,
    ]
    (RESULTS / "ip_adapter.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
