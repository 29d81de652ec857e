"""What a trial has to show so far, in the order it happened: the one reading of run directories that trackers share."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.tracker import StudyView, TrialView
from trainers.rundir import RunDir, RunResult

_KINDS = ("train", "validation", "report", "samples")
"""Events with a step. A job that was lost repeats those since its last checkpoint, with the same content."""
_MAX_NAME = 80


@dataclass(frozen=True)
class Point:
    """A number at a step."""

    name: str
    """As in `train/loss`: the event's kind, then what was measured."""
    value: float
    step: int
    time: float
    """Seconds since 1970, by the job's clock."""


@dataclass(frozen=True)
class Picture:
    """A picture at a step."""

    name: str
    path: Path
    step: int
    time: float


@dataclass(frozen=True)
class Progress:
    """Up to where a run's events were read."""

    offset: int = 0
    """Bytes of `events.jsonl`."""
    steps: tuple[int, ...] = (-1,) * len(_KINDS)
    """The last step of each kind."""

    def __str__(self) -> str:
        return ":".join(map(str, (self.offset, *self.steps)))

    @classmethod
    def parse(cls, text: str) -> "Progress":
        """What `str` made; the beginning if `text` is empty."""
        offset, *steps = map(int, (text or "0").split(":"))
        return cls(offset, (*steps, *cls.steps[len(steps) :]))


@dataclass(frozen=True)
class News:
    """What was written since some earlier progress."""

    progress: Progress
    points: list[Point] = field(default_factory=list[Point])
    pictures: list[Picture] = field(default_factory=list[Picture])


def read_news(run: RunDir, since: Progress) -> News:
    """Everything after `since`, each step once."""
    if not run.events.exists() or run.events.stat().st_size <= since.offset:
        return News(since)
    offset, steps = since.offset, dict(zip(_KINDS, since.steps, strict=True))
    points: list[Point] = []
    pictures: list[Picture] = []
    for end, event in run.read_events(offset):
        offset = end
        kind = event["event"]
        if kind in steps and event["step"] > steps[kind]:
            steps[kind] = event["step"]
            points += _points(event)
            pictures += _pictures(event, run)
    return News(Progress(offset, tuple(steps.values())), points, pictures)


def outcome(study: StudyView, trial: TrialView) -> dict[str, float]:
    """Every number that is known of a trial at its end, by name."""
    told = objectives(study.value_names, trial.values)
    told |= {f"violation/{plain(bound)}": amount for bound, amount in trial.violations.items()}
    if result := trial.run.read_result():
        told |= scores(result)
    return told


def scores(result: RunResult) -> dict[str, float]:
    """Metrics of a finished trial by name; scores are `<metric>/<model>`, their standard errors end in `_se`."""
    named: dict[str, float] = {}
    for metric, score in result.scores.items():
        name = f"{plain(metric)}/{plain(score.model)}"
        named |= {name: score.mean, f"{name}_se": score.standard_error}
        if score.num_undefined:
            named[f"{name}_undefined"] = float(score.num_undefined)
    named |= {f"seconds/{plain(stage)}": seconds for stage, seconds in result.seconds.items()}
    return {**named, "peak_bytes": float(result.peak_bytes)}


def objectives(names: Sequence[str], values: Sequence[float] | None) -> dict[str, float]:
    """`objective`, or `objective/<name>` of each if there are several."""
    if values is None:
        return {}
    if len(names) == 1:
        return {"objective": values[0]}
    return {f"objective/{plain(name)}": value for name, value in zip(names, values, strict=True)}


def plain(name: str) -> str:
    """`name` without what a tracker's names cannot hold, so that `/` stays free to group charts."""
    return re.sub(r"[^\w.\- ]", "-", name)[:_MAX_NAME]


def _points(event: Mapping[str, Any]) -> Iterator[Point]:
    kind, step, moment = event["event"], event["step"], event["time"]
    numbers = event.get("scores", event)  # a report's are its means; its prompts are for the pruner
    for name, value in numbers.items():
        if isinstance(value, int | float) and name not in {"step", "time"}:
            yield Point(f"{kind}/{plain(name)}", float(value), step, moment)


def _pictures(event: Mapping[str, Any], run: RunDir) -> Iterator[Picture]:
    for file in event.get("files", ()):
        path = run.path / file
        if path.is_file():
            yield Picture(f"{event['event']}/{plain(path.stem)}", path, event["step"], event["time"])
