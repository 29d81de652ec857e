"""Does golden section find the best guidance scale, and does each kind of guidance help? Judged by pixels and scores.

    python -m tests.benchmarks.guidance_regret run FOLDER [zog wug]     # goes on where it was interrupted
    python -m tests.benchmarks.guidance_regret table FOLDER

An adapter is trained for each subject, once. The scale is searched on [-2, 10] as a study does it (a scan of six
points, then golden section, 14 evaluations at most) on the search's three seeds. A dense grid, one scale every 0.5, and
what was found are then drawn with a seed that no search has seen. Regret is how far the found scale is below the best
of the grid there; since the grid's best is chosen by the very pictures that judge it, chance is on its side. So both
are drawn once more with two seeds that have chosen neither: the fair regret.

Every search is made twice: by pixel truth, which no real study has, and by the study's scores. Autoguidance's inner
scale is what the search of classifier-free guidance found by the scores. FOLDER, which is not in the repository, keeps
adapters and every evaluation; processes with different subjects may share it.
"""

import argparse
import json
import platform
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.config import EvaluateConfig
from evaluation.encoders import ClipEncoders
from evaluation.metric import Scorer
from evaluation.statistics import Panel, paired_difference
from orchestrator.line import Line, Point, paired_error
from tests.benchmarks.learnability import WEIGHTS, wanted_scenes
from trainers.backbone import Model
from trainers.cache import Cache
from trainers.guidance import AutoGuidance, ClassifierFree, Guidance, SamplingConfig, WeightInterpolated
from trainers.methods.dreambooth import DreamboothConfig
from trainers.miniature.pictures import to_unit
from trainers.miniature.recipe import subject_scenes
from trainers.miniature.truth import compare
from trainers.miniature.world import SUBJECTS, caption, draw, random_placement
from trainers.prompt import Prompt, Request
from trainers.rundir import RunDir, write_atomically
from trainers.sampling import generate
from trainers.train import build_accelerator, train

RESULTS = Path(__file__).parent / "results"
LOW, HIGH, STEP = -2.0, 10.0, 0.5
GRID = [float(x) for x in np.arange(LOW, HIGH + STEP / 2, STEP)]
SCAN, MAX_POINTS = 6, 14
"""The sampler's defaults."""
SEARCHED, FRESH = (0, 1, 2), (100,)
"""Seeds of the pictures that the search sees, and of those that choose the grid's best."""
FAIR = (200, 201)
"""Seeds that neither the search nor the choice of the grid's best has seen."""
UNSEEN = (*FRESH, *FAIR)
"""By the search."""
KINDS = {"zog": ("cfg", "wig", "autoguidance"), "wug": ("cfg", "wig", "autoguidance")}
"""Of the first two subjects; the others have classifier-free guidance alone."""
OBJECTIVES = ("truth", "scores")
WEIGHTED = {"clip_i": 1.0, "clip_t": 1.0, "aesthetic": 0.1}
"""The objective of studies/dreambooth.yaml."""
SAMPLING: dict[str, Any] = {"resolution": 64, "steps": 8, "batch_size": 8}
TRAINING_STEPS = 120


@dataclass
class Judge:
    """An adapter, what is drawn with it, and what every evaluation so far has said."""

    folder: Path
    subject: str

    def __post_init__(self) -> None:
        self._file = self.folder / "evaluations.json"
        self._known: dict[str, dict[str, list[float]]] = (
            json.loads(self._file.read_text()) if self._file.exists() else {}
        )

    def values(self, kind: str, scale: float, seed: int, inner: float | None = None) -> dict[str, list[float]]:
        """Each prompt's value by each objective, computed once."""
        key = f"{kind} {scale:.6f} seed {seed}" + ("" if inner is None else f" inner {inner:.6f}")
        if key not in self._known:
            self._known[key] = self._evaluate(guidance(kind, scale, inner), seed)
            write_atomically(self._file, json.dumps(self._known))
        return self._known[key]

    def search(self, kind: str, objective: str) -> tuple[Point, int]:
        """The best evaluated scale, and how many were evaluated."""
        points: list[Point] = []
        while wanted := Line(LOW, HIGH, SCAN, MAX_POINTS, None, tuple(points)).missing():
            points.append(self.point(kind, objective, wanted[0], SEARCHED))
        return Line(LOW, HIGH, SCAN, MAX_POINTS, None, tuple(points)).best(), len(points)

    def point(self, kind: str, objective: str, scale: float, seeds: Sequence[int]) -> Point:
        """A scale on some seeds; a prompt's value is the mean over them."""
        inner = self.inner(kind)
        drawn = [self.values(kind, scale, seed, inner)[objective] for seed in seeds]
        panel = tuple(float(value) for value in np.mean(drawn, axis=0))
        return Point(scale, float(np.mean(panel)), panel)

    def best_of_grid(self, kind: str, objective: str) -> Point:
        """The best scale of the grid on the judge's seed."""
        return max((self.point(kind, objective, x, FRESH) for x in GRID), key=lambda one: one.value)

    def inner(self, kind: str) -> float | None:
        """What autoguidance's models are guided by inside."""
        return self.search("cfg", "scores")[0].x if kind == "autoguidance" else None

    def _evaluate(self, guidance: Guidance, seed: int) -> dict[str, list[float]]:
        scenes = wanted_scenes(self.subject)
        requests = [Request(Prompt(text=text), seed) for text in scenes]
        sampling = SamplingConfig.model_validate({**SAMPLING, "guidance": guidance})
        samples = list(generate(self._model, requests, sampling))
        pictures = [to_unit(torch.from_numpy(np.array(one.image)).permute(2, 0, 1)[None]) for one in samples]
        truth = [compare(p, scenes[str(s.prompt)])[0].whole for p, s in zip(pictures, samples, strict=True)]
        columns = {name: np.asarray(scorer.values(samples)) for name, scorer in self._scorers.items()}
        total = sum((WEIGHTED[name] * column for name, column in columns.items()), np.zeros(len(samples)))
        return {"truth": truth, "scores": [float(value) for value in total]}

    @cached_property
    def _config(self) -> DreamboothConfig:
        tree = {
            "backbone": {"kind": "sdxl", "path": WEIGHTS / "sdxl"},
            "data": {"kind": "folder", "path": _write_photos(self.subject, self.folder / "photos"), "resolution": 64,
                     "holdout": 4},
            "lora": {"rank": 8},
            "optimizer": {"kind": "adamw", "lr": 2e-3},
            "schedule": {"kind": "cosine", "warmup_steps": 10},
            "steps": TRAINING_STEPS,
            "batch_size": 4,
            "weak_fraction": 0.3,
        }  # fmt: skip
        return DreamboothConfig.model_validate(tree)

    @cached_property
    def _model(self) -> Model:
        config, run = self._config, RunDir(self.folder / "run")
        accelerator = build_accelerator(config)
        if not (run.path / "trained").exists():
            train(config, run, 0, self.folder / "cache", accelerator)
            (run.path / "trained").touch()
        return config.load_trained(run.adapter, accelerator)

    @cached_property
    def _scorers(self) -> Mapping[str, Scorer]:
        clip = {"model": WEIGHTS / "clip"}
        metrics = {
            "clip_t": {"kind": "clip_text", **clip},
            "clip_i": {"kind": "clip_image", **clip},
            "aesthetic": {"kind": "aesthetic", **clip, "head": WEIGHTS / "aesthetic.safetensors"},
        }
        judged = EvaluateConfig.model_validate({"prompts": list(wanted_scenes(self.subject)), "metrics": metrics})
        encoders = ClipEncoders(torch.device("cpu"), Cache(self.folder / "cache"))
        references = [example.path for example in self._config.data.split().held_out]
        return {name: metric.open(encoders, references) for name, metric in judged.metrics.items()}


def guidance(kind: str, scale: float, inner: float | None) -> Guidance:
    """Guidance of a kind; WIG's null prediction is the base's."""
    makers: Mapping[str, Callable[[], Guidance]] = {
        "cfg": lambda: ClassifierFree(scale=scale),
        "wig": lambda: WeightInterpolated(scale=scale, omega=0.0),
        "autoguidance": lambda: AutoGuidance.model_validate({"scale": scale, "cfg_scale": inner}),
    }
    return makers[kind]()


def _write_photos(subject: str, folder: Path) -> Path:
    """Sixteen captioned pictures of a subject, as studies/data/zog has them."""
    rng = random.Random(f"regret/{subject}")
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(subject_scenes(subject)):
        picture = draw(scene, random_placement(rng))
        if not (folder / f"{number:02d}.txt").exists():
            picture.save(folder / f"{number:02d}.png")
            (folder / f"{number:02d}.txt").write_text(caption(scene) + "\n", encoding="utf-8")
    return folder


def kinds(subject: str) -> Sequence[str]:
    """The kinds of guidance that are searched for a subject."""
    return KINDS.get(subject, ("cfg",))


def run(folder: Path, subjects: Sequence[str]) -> None:
    """Every evaluation that is not yet in the folder."""
    for subject in subjects:
        judge = Judge(folder / subject, subject)
        judge.point("cfg", OBJECTIVES[0], 1.0, UNSEEN)
        for kind in kinds(subject):
            for objective in OBJECTIVES:
                found, count = judge.search(kind, objective)
                print(f"{subject} {kind} by {objective}: {found.x:.2f} of {count} evaluations", flush=True)
                judge.point(kind, objective, found.x, UNSEEN)
                judge.point(kind, objective, judge.best_of_grid(kind, objective).x, FAIR)


@dataclass(frozen=True)
class Row:
    """One search, judged on fresh seeds."""

    subject: str
    kind: str
    objective: str
    found: float
    count: int
    best: float
    """Of the grid."""
    value: float
    regret: float
    error: float
    """Paired standard error of the regret."""
    fair: float
    """The regret on pictures that have chosen neither scale."""
    fair_error: float
    panel: Panel
    """What was found, on all seeds that the search has not seen."""
    inner: float | None


def row(judge: Judge, kind: str, objective: str) -> Row:
    """Compare what was found with the grid."""
    found, count = judge.search(kind, objective)
    best, ours = judge.best_of_grid(kind, objective), judge.point(kind, objective, found.x, FRESH)
    theirs, mine = (judge.point(kind, objective, scale, FAIR) for scale in (best.x, found.x))
    return Row(
        judge.subject, kind, objective, found.x, count, best.x, ours.value, best.value - ours.value,
        paired_error(best, ours) or 0.0, theirs.value - mine.value, paired_error(theirs, mine) or 0.0,
        _panel(judge.point(kind, objective, found.x, UNSEEN)), judge.inner(kind),
    )  # fmt: skip


def write(folder: Path) -> None:
    """The tables, of the subjects that are complete."""
    judges = {path.name: Judge(path, path.name) for path in sorted(folder.iterdir()) if path.name in SUBJECTS}
    rows = [
        row(judges[name], kind, by) for by in OBJECTIVES for name in SUBJECTS if name in judges for kind in kinds(name)
    ]
    prompts = len(wanted_scenes("zog"))
    panel = f"{prompts} prompts; {len(SEARCHED)} seeds for searching, one for the grid, {len(FAIR)} for the fair regret"
    text = [
        "# Regret of guidance search",
        "",
        f"`python -m tests.benchmarks.guidance_regret` on {platform.machine()}, torch {torch.__version__}: SDXL of the",
        f"miniature family, LoRA of rank 8, {TRAINING_STEPS} steps; pictures in {SAMPLING['steps']} steps;",
        f"{panel}; a grid of {len(GRID)} scales. The script says more.",
        "",
        "Regret is the value of the grid's best scale minus that of the found one, on the pictures that chose the",
        "grid's best: the luckiest of all scales, so it is rarely below 0. Fair regret is the same difference on",
        "pictures that have chosen neither; below 0 the found scale is the better one. Of equally good scales, five in",
        "six are within one standard error.",
        "",
        "| judged by | subject | guidance | found | evaluations | grid's best | value | regret | its error | within "
        "| fair regret | its error | within |",
        "| --- | --- | --- | --: | --: | --: | --: | --: | --: | --- | --: | --: | --- |",
        *(
            f"| {one.objective} | {one.subject} | {one.kind} | {one.found:.2f} | {one.count} | {one.best:g} | "
            f"{one.value:.3f} | {one.regret:+.4f} | {one.error:.4f} | {_within(one.regret, one.error)} | "
            f"{one.fair:+.4f} | {one.fair_error:.4f} | {_within(one.fair, one.fair_error)} |"
            for one in rows
        ),
        "",
        f"{sum(one.regret <= one.error for one in rows)} of {len(rows)} searches are within one standard error where "
        "the grid's best is chosen by the pictures that judge it, "
        f"{sum(one.fair <= one.fair_error for one in rows)} where other pictures judge both.",
        "",
        "## The three kinds",
        "",
        f"At the scale that each search found, on the {len(UNSEEN)} seeds that it has not seen; differences are paired",
        "by prompt, with their 95 % intervals. Arrows: the interval lies above or below 0.",
        "",
        "| judged by | subject | guidance | scale | value | minus no guidance | minus cfg |",
        "| --- | --- | --- | --: | --: | --: | --: |",
        *(_compared(judges[one.subject], one, rows) for one in rows if one.subject in KINDS),
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "guidance_regret.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


def _within(regret: float, error: float) -> str:
    return "yes" if regret <= error else "no"


def _compared(judge: Judge, one: Row, rows: Sequence[Row]) -> str:
    """One kind's best next to no guidance and to classifier-free guidance."""
    free = next(r for r in rows if (r.subject, r.kind, r.objective) == (one.subject, "cfg", one.objective))
    cells = [_difference(one.panel, _panel(judge.point("cfg", one.objective, 1.0, UNSEEN)))]
    cells.append("" if one is free else _difference(one.panel, free.panel))
    name = one.kind if one.inner is None else f"{one.kind} (cfg {one.inner:.2f} inside)"
    return (
        f"| {one.objective} | {one.subject} | {name} | {one.found:.2f} | {statistics.fmean(one.panel.values()):.3f} | "
        + " | ".join(cells)
        + " |"
    )


def _panel(point: Point) -> Panel:
    return {(str(i), 0): value for i, value in enumerate(point.panel)}


def _difference(ours: Panel, theirs: Panel) -> str:
    gain = paired_difference(ours, theirs)
    arrow = " ↑" if gain.low > 0 else " ↓" if gain.high < 0 else ""
    return f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}){arrow}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("folder", type=Path, help="where adapters and evaluations lie")
    parser.add_argument("subjects", nargs="*", default=list(SUBJECTS))
    arguments = parser.parse_args()
    if arguments.action == "run":
        run(arguments.folder, arguments.subjects)
    else:
        write(arguments.folder)


if __name__ == "__main__":
    main()
