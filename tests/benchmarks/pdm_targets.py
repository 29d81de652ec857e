"""What should the query-matching loss compare with? An ablation on the miniature world, judged by pixel truth.

    python -m tests.benchmarks.pdm_targets run FOLDER --seeds 0 1 2     # goes on where it was interrupted
    python -m tests.benchmarks.pdm_targets table FOLDER

DreamBooth with five captioned pictures of a held-out subject ("a zog on a red background"), beside the matching loss
with targets of several kinds: queries of the frozen model at the same latents, or at the latents of the picture's DDIM
inversion, under the picture's own prompt or the class's. Every variant is shown the same two pictures of the subject in
each step. Each is judged by what it draws: the subject (pixels of the object, and of the background that the prompt
asks for), stars, which are its class, and other things. Differences are paired by prompt and seed; intervals are 95 %
over prompts. A trial needs some 50 s of one core; processes with different seeds may share a folder.
"""

import argparse
import json
import platform
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.statistics import estimate, paired_difference
from trainers.guidance import SamplingConfig
from trainers.methods.pdmbooth import PdmboothConfig
from trainers.miniature.pictures import to_unit
from trainers.miniature.recipe import SUBJECT_BACKGROUNDS
from trainers.miniature.truth import compare
from trainers.miniature.world import COLOURS, Scene, caption, is_held_out, random_scene, subject
from trainers.prompt import Prompt, Request
from trainers.rundir import RunDir
from trainers.sampling import generate
from trainers.train import build_accelerator, train

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "studies" / "data" / "zog"
RESULTS = Path(__file__).parent / "results"
PICTURES = ("00", "02", "04", "06", "08")
Rows = list[dict[str, Any]]
"""One a picture: what drew it, what was asked for, and the truth."""
STEPS, RATE = 150, 3e-3


@dataclass(frozen=True)
class Variant:
    """What is trained beside the subject's denoising loss, and for how long."""

    pdm: Mapping[str, Any] | None = None
    """The section `pdm`; None leaves matching out."""
    steps: int = STEPS


_INVERTED = {"target": {"kind": "inverted", "steps": 50}}
VARIANTS: Mapping[str, Variant] = {
    "no matching": Variant(),
    "no matching, half the steps": Variant(steps=STEPS // 2),
    "same latents, weight 1": Variant({"weight": 1.0}),
    "same latents, weight 10": Variant({"weight": 10.0}),
    "inverted, weight 0.3": Variant({"weight": 0.3, **_INVERTED}),
    "inverted, weight 1": Variant({"weight": 1.0, **_INVERTED}),
    "inverted, class prompt, weight 0.05": Variant({"weight": 0.05, "prompt": "a star", **_INVERTED}),
}
"""The last is the published choice, 0.05 its weight for LoRA; half the steps is keeping by learning less."""
PAIRS = (("same latents, weight 1", "inverted, weight 0.3"), ("same latents, weight 1", "inverted, weight 1"))
"""Of which differences are shown too."""
MEASURES = {
    "subject": (("learnt",), "subject"),
    "its background": (("learnt",), "background"),
    "class kept": (("class",), "whole"),
    "others kept": (("others",), "whole"),
    "all kept": (("class", "others"), "whole"),
}


def judged_scenes() -> dict[str, dict[str, Scene]]:
    """By group and prompt: the subject on new and known backgrounds, its class, and other things."""
    new = [colour for colour in COLOURS if colour not in SUBJECT_BACKGROUNDS]
    learnt = [subject("zog", background) for background in (*new, *SUBJECT_BACKGROUNDS[:4])]
    rng = random.Random("pdm targets")
    plain = [scene for scene in (random_scene(rng, portraits=0) for _ in range(400)) if not is_held_out(scene)]
    stars = [scene for scene in plain if scene.shape == "star"][:8]
    others = [scene for scene in plain if scene.shape != "star"][:8]
    return {
        group: {caption(scene): scene for scene in scenes}
        for group, scenes in {"learnt": learnt, "class": stars, "others": others}.items()
    }


def trial(variant: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Train one variant with one seed, or take the base, and judge what it draws; one row a picture."""
    chosen = VARIANTS.get(variant, Variant())
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        if not (pictures / f"{name}.png").exists():
            shutil.copy(SOURCE / f"{name}.txt", pictures)
            shutil.copy(SOURCE / f"{name}.png", pictures)
    config = PdmboothConfig.model_validate(
        {
            "backbone": {"kind": "sdxl", "path": ROOT / "trainers" / "miniature" / "weights" / "sdxl"},
            "data": {"kind": "folder", "path": pictures, "resolution": 64},
            "lora": {"rank": 8},
            "optimizer": {"kind": "adamw", "lr": RATE},
            "schedule": {"kind": "cosine", "warmup_steps": 10},
            "pdm": chosen.pdm,
            "steps": chosen.steps,
            "batch_size": 4 if chosen.pdm else 2,
            "checkpoint_every": STEPS,
        }
    )
    accelerator = build_accelerator(config)
    run = RunDir(folder / _slug(variant, seed))
    shutil.rmtree(run.path, ignore_errors=True)
    if variant == "base":
        model = config.load_trained(None, accelerator)
    else:
        model = train(config, run, seed, folder / "cache", accelerator).method.model
    return judge(model, {"variant": variant, "seed": seed})


def judge(model: Any, named: dict[str, Any]) -> list[dict[str, Any]]:
    """Draw all judged prompts and compare every picture with its scene."""
    scenes = judged_scenes()
    groups = {prompt: group for group, prompts in scenes.items() for prompt in prompts}
    requests = [Request(Prompt(text=prompt), named["seed"]) for prompt in groups]
    sampling = SamplingConfig.model_validate(
        {"resolution": 64, "steps": 12, "guidance": {"kind": "cfg", "scale": 3.0}, "batch_size": 16}
    )
    rows: list[dict[str, Any]] = []
    for sample in generate(model, requests, sampling):
        prompt = str(sample.prompt)
        pixels = to_unit(torch.from_numpy(np.array(sample.image)).permute(2, 0, 1)[None])
        truth = compare(pixels, scenes[groups[prompt]][prompt])[0]
        values = {"subject": truth.subject, "background": truth.background, "whole": truth.whole}
        rows.append({**named, "group": groups[prompt], "prompt": prompt, **values})
    return rows


def run(folder: Path, seeds: list[int]) -> None:
    """Every variant with every seed that is not yet in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for variant in ("base", *VARIANTS):
            file = folder / f"{_slug(variant, seed)}.json"
            if not file.exists():
                file.write_text(json.dumps(trial(variant, seed, folder)), encoding="utf-8")
                print(file, flush=True)


def _slug(variant: str, seed: int) -> str:
    return f"{seed}_{variant.replace(',', '').replace(' ', '_')}"


def panel(rows: Rows, measure: str) -> dict[tuple[str, int], float]:
    """One value for each prompt and seed; a trial draws with its own training seed."""
    groups, column = MEASURES[measure]
    return {(row["prompt"], row["seed"]): row[column] for row in rows if row["group"] in groups}


def write(folder: Path) -> None:
    """The table, from whatever is in the folder."""
    files = sorted(folder.glob("*.json"))
    by_variant: dict[str, Rows] = {}
    for file in files:
        rows: Rows = json.loads(file.read_text(encoding="utf-8"))
        by_variant.setdefault(rows[0]["variant"], []).extend(rows)
    lines: list[str] = []
    for variant in ("base", *VARIANTS):
        cells: list[str] = []
        for measure in MEASURES:
            cell = f"{estimate(panel(by_variant[variant], measure)).mean:.3f}"
            if variant not in ("base", "no matching"):
                cell += f", {_change(by_variant[variant], by_variant['no matching'], measure)}"
            cells.append(cell)
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    pairs = [
        f"| {ours}, against {theirs} | "
        + " | ".join(_change(by_variant[ours], by_variant[theirs], measure) for measure in MEASURES)
        + " |"
        for ours, theirs in PAIRS
    ]
    seeds = ", ".join(map(str, sorted({row["seed"] for row in by_variant["base"]})))
    text = [
        "# Targets of the query-matching loss",
        "",
        f"`python -m tests.benchmarks.pdm_targets`: training seeds {seeds}, {STEPS} steps, LoRA of rank 8 at",
        f"{RATE}, {len(PICTURES)} pictures; {platform.machine()}, torch {torch.__version__}.",
        "Truth, from 0 to 1; behind it the paired difference to no matching with its 95 % interval. Arrows: the",
        "interval lies above or below 0. Targets are told the picture's own caption unless the row says otherwise.",
        "",
        "| target of matching | " + " | ".join(MEASURES) + " |",
        "| --- |" + " --- |" * len(MEASURES),
        *lines,
        *pairs,
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "pdm_targets.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def _change(ours: Rows, theirs: Rows, measure: str) -> str:
    gain = paired_difference(panel(ours, measure), panel(theirs, measure))
    clear = " ↑" if gain.low > 0 else " ↓" if gain.high < 0 else ""
    return f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}){clear}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("folder", type=Path, help="where trials lie; not in the repository")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.action == "run":
        run(arguments.folder, arguments.seeds)
    write(arguments.folder)


if __name__ == "__main__":
    main()
