"""Can an adapter learn something new in the miniature world, and does it matter how? A dense grid, judged by pixels.

    python -m tests.benchmarks.learnability zog      # a held-out subject; `nuvo` is a held-out style

Every point is an ordinary trial (the project's own training, sampling and scoring). `truth` is the geometric mean of
how well object and background match what was asked for, from pixels alone (`trainers/miniature/truth.py`); its
interval is a paired bootstrap over prompts against the untrained base. The table also holds what the learned scorers
say, so that objectives can be compared with the truth. Results go to tests/benchmarks/results/.
"""

# pyright: basic, reportAttributeAccessIssue=false, reportArgumentType=false

import argparse
import itertools
import json
import platform
import random
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.stats import spearmanr

from evaluation.config import EvaluateConfig
from evaluation.evaluate import evaluate, open_scorers
from evaluation.records import Record, read_records
from evaluation.statistics import paired_difference
from trainers.methods.sdxl_lora import SdxlLoraConfig
from trainers.miniature.pictures import to_unit
from trainers.miniature.recipe import SUBJECT_BACKGROUNDS, style_scenes
from trainers.miniature.truth import compare
from trainers.miniature.world import COLOURS, SIZE, Scene, caption, subject
from trainers.prompt import Prompt, Sample
from trainers.rundir import RunDir
from trainers.train import build_accelerator, train

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "trainers" / "miniature" / "weights"
RESULTS = Path(__file__).parent / "results"
RATES = {"zog": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "nuvo": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
RANKS = {"zog": (2, 8, 16), "nuvo": (4, 16)}
STEPS = {"zog": (100, 300), "nuvo": (200, 600)}
SEEDS = (0, 1)
_CLIP = {"model": WEIGHTS / "clip"}
METRICS: dict[str, dict[str, Any]] = {
    "clip_t": {"kind": "clip_text", **_CLIP},
    "clip_i": {"kind": "clip_image", **_CLIP},
    "aesthetic": {"kind": "aesthetic", **_CLIP, "head": WEIGHTS / "aesthetic.safetensors"},
}


@dataclass(frozen=True)
class Point:
    """One trial of the grid; rate 0 is the base."""

    rate: float
    rank: int
    steps: int


def wanted_scenes(concept: str) -> dict[str, Scene]:
    """What the panel asks for: the subject on backgrounds it was not photographed on, or new objects in the style."""
    if concept == "nuvo":
        scenes = style_scenes("nuvo", 12, seed=99)
    else:
        new = [colour for colour in COLOURS if colour not in SUBJECT_BACKGROUNDS]
        scenes = [subject(concept, background) for background in (*new, *SUBJECT_BACKGROUNDS[:4])]
    return {caption(scene): scene for scene in scenes}


def trial(
    concept: str, point: Point, run: RunDir, cache: Path, judged: Mapping[str, Any] = MappingProxyType({})
) -> list[Record]:
    """Train at `point` and score the panel; leaves samples and records in `run`. `judged` changes what is scored."""
    scenes = wanted_scenes(concept)
    config = SdxlLoraConfig.model_validate(
        {
            "backbone": {"kind": "sdxl", "path": WEIGHTS / "sdxl"},
            "data": {"kind": "folder", "path": ROOT / "studies" / "data" / concept, "resolution": SIZE, "holdout": 4},
            "lora": {"rank": point.rank},
            "optimizer": {"kind": "adamw", "lr": point.rate or 1e-9},
            "schedule": {"kind": "cosine", "warmup_steps": 0 if point.rate == 0 else 10},
            "steps": point.steps,
            "batch_size": 4,
            "checkpoint_every": point.steps,
        }
    )
    panel = EvaluateConfig.model_validate(
        {
            "prompts": list(scenes),
            "seeds": SEEDS,
            "resolution": SIZE,
            "steps": 20,
            "guidance": {"kind": "cfg", "scale": 3.0},
            "batch_size": 16,
            "metrics": METRICS,
            **judged,
        }
    )
    accelerator = build_accelerator(config)
    method = train(config, run, 0, cache, accelerator).method
    scorers = open_scorers(panel, method.held_out, method.backbone.device, cache)
    evaluate(method.backbone, panel, scorers, run)
    return read_records(run.records)


def requested_truths(samples: Iterable[Sample], scenes: dict[str, Scene]) -> dict[tuple[str, int], float]:
    """The pixel truth of every sample."""
    found = {}
    for sample in samples:
        pixels = torch.from_numpy(np.array(sample.image)).permute(2, 0, 1)[None]
        found[sample.prompt.text, sample.seed] = compare(to_unit(pixels), scenes[sample.prompt.text])[0].whole
    return found


def main() -> None:
    """Run the grid and write table and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("concept", choices=tuple(RATES))
    parser.add_argument("--points", type=int, help="a random subset of the grid, for a first look")
    arguments = parser.parse_args()
    grid = [
        Point(*values) for values in itertools.product(*(values[arguments.concept] for values in (RATES, RANKS, STEPS)))
    ]
    if arguments.points:
        grid = random.Random(0).sample(grid, arguments.points)
    scenes = wanted_scenes(arguments.concept)
    rows, strips = [], {}
    with tempfile.TemporaryDirectory() as folder:
        base: dict[tuple[str, int], float] = {}
        for index, point in enumerate([Point(0, 2, 1), *grid]):
            started, run = time.monotonic(), RunDir(Path(folder) / str(index))
            records = trial(arguments.concept, point, run, Path(folder) / "cache")
            samples = (Sample(Prompt(text=r.prompt), r.seed, Image.open(run.path / r.file)) for r in records)
            truth = requested_truths(samples, scenes)
            base = base or truth
            gain = paired_difference(truth, base)
            scores = {
                name: float(np.mean([record.values[name] for record in records]))
                for name in ("clip_t", "clip_i", "aesthetic")
            }
            row = {"rate": point.rate, "rank": point.rank, "steps": point.steps, "truth": np.mean([*truth.values()])}
            row |= {
                "gain": gain.mean,
                "low": gain.low,
                "high": gain.high,
                **scores,
                "seconds": time.monotonic() - started,
            }
            rows.append(row)
            strips[point] = [Image.open(run.path / r.file).copy() for r in records if r.seed == SEEDS[0]]
            print(json.dumps({k: round(float(v), 5) for k, v in row.items()}), flush=True)
    write(arguments.concept, pd.DataFrame(rows), strips)


def write(concept: str, table: pd.DataFrame, strips: dict[Point, list[Image.Image]]) -> None:
    """The Markdown table, and a picture with one row per learning rate at the best rank and number of steps."""
    RESULTS.mkdir(exist_ok=True)
    trials = table[table.rate > 0]
    best = trials.loc[trials.truth.idxmax()]
    shown = [Point(0, 2, 1), *(Point(rate, int(best["rank"]), int(best.steps)) for rate in RATES[concept])]
    rows = [strips[point] for point in shown if point in strips]
    sheet = Image.new("RGB", (SIZE * len(rows[0]), SIZE * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * SIZE, y * SIZE))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(
        RESULTS / f"learnability_{concept}.png"
    )
    objectives = {
        "clip_t": table.clip_t,
        "clip_i": table.clip_i,
        "aesthetic": table.aesthetic,
        "0.6 clip_t + 0.04 aesthetic": 0.6 * table.clip_t + 0.04 * table.aesthetic,
        "clip_i + clip_t + 0.1 aesthetic": table.clip_i + table.clip_t + 0.1 * table.aesthetic,
    }
    base = table[table.rate == 0].iloc[0]
    lines = [
        f"# Learnability: {concept}",
        "",
        f"`python -m tests.benchmarks.learnability {concept}` on {platform.machine()}, torch {torch.__version__};",
        f"every number is in [learnability_{concept}.csv](learnability_{concept}.csv).",
        "Rows of the picture: the base, then the learning rates in rising order at the best rank and number of steps.",
        "",
        f"![pictures](learnability_{concept}.png)",
        "",
        f"Truth, from 0 to 1. The base has {base.truth:.3f}. Arrows: the 95 % interval of the difference to",
        "the base lies above or below 0.",
        "",
        *_grid(concept, trials),
        "",
        f"Best: rate {best.rate:g}, rank {best['rank']:.0f}, {best.steps:.0f} steps: {best.truth:.3f}, "
        f"better than the base by {best.gain:.3f} ({best.low:.3f} to {best.high:.3f}).",
        "",
        "| objective | rank correlation with the truth |",
        "| --- | --: |",
        *(f"| {name} | {spearmanr(values, table.truth).statistic:.2f} |" for name, values in objectives.items()),
    ]
    (RESULTS / f"learnability_{concept}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    table.round(5).to_csv(RESULTS / f"learnability_{concept}.csv", index=False)


def _grid(concept: str, trials: pd.DataFrame) -> list[str]:
    columns = list(itertools.product(RANKS[concept], STEPS[concept]))
    cells = {(row.rate, row.rank, row.steps): row for row in trials.itertuples()}
    lines = ["| rate | " + " | ".join(f"rank {rank}, {steps} steps" for rank, steps in columns) + " |"]
    lines.append("| --: |" + " --: |" * len(columns))
    for rate in RATES[concept]:
        found = [cells.get((rate, *column)) for column in columns]
        words = [
            "" if c is None else f"{c.truth:.3f} {'↑' if c.low > 0 else '↓' if c.high < 0 else ' '}" for c in found
        ]
        lines.append(f"| {rate:g} | " + " | ".join(words) + " |")
    return lines


if __name__ == "__main__":
    main()
