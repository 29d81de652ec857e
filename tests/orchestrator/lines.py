"""Curves, and studies of one number, for tests of searches along a line."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import optuna
import yaml

from orchestrator.drawing import DrawingSampler
from orchestrator.golden_section import GoldenSectionSampler
from orchestrator.line import Line, Point
from orchestrator.search import FloatParameter
from orchestrator.spec import StudySpec
from tests.orchestrator.cluster import spec_of
from tests.orchestrator.studies import TREE

Curve = Callable[[float], float]
SPACE = {"x": FloatParameter(low=-10, high=10)}
SCALE = "evaluate.guidance.scale"


def study_of(sampler: GoldenSectionSampler, default: float = 3.0) -> optuna.Study:
    """A search of x, without a study file."""
    return optuna.create_study(direction="maximize", sampler=DrawingSampler(sampler, SPACE, [{"x": default}]))


def ask(study: optuna.Study) -> tuple[optuna.Trial, float]:
    """The next trial and its x."""
    trial = study.ask()
    return trial, SPACE["x"].suggest(trial, "x")


def panels_of(curve: Curve, spread: float, num_prompts: int = 16) -> Callable[[float], Point]:
    """Points whose prompts differ in how they gain, so that paired differences have an error."""
    rng = random.Random(1)

    def at(x: float) -> Point:
        gains = [rng.gauss(0, spread) for _ in range(num_prompts)]
        centred = [gain - math.fsum(gains) / num_prompts for gain in gains]
        return Point(x, curve(x), tuple(curve(x) + gain for gain in centred))

    return at


def scanned(curve: Curve, spread: float, tolerance: float | None = None) -> Line:
    """A complete scan, and the default."""
    at = panels_of(curve, spread)
    return Line(-10, 10, 6, 14, tolerance, tuple(at(x) for x in (-10.0, -6.0, -2.0, 2.0, 6.0, 10.0, 3.0)))


def golden_spec(folder: Path, *sets: str) -> StudySpec:
    """A study of the guidance scale on [-10, 10], whose template says 5."""
    folder.mkdir(exist_ok=True)
    tree = {
        **TREE,
        "search": {SCALE: {"kind": "float", "low": -10, "high": 10}},
        "sampler": {"kind": "golden_section"},
        "limits": {"trials": 20},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(tree))
    return spec_of(folder, *sets)
