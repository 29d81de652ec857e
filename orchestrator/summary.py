"""Several studies on one page: a table of their winners, and what they drew along the number that was searched."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.confirm import find_contest, read_confirmation, winning_trial
from orchestrator.front import feasible
from orchestrator.ledger import has_study, read_trials
from orchestrator.search import RealParameter
from orchestrator.tables import short_names
from trainers.rundir import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from orchestrator.series import Member, Series
    from orchestrator.spec import StudySpec
    from orchestrator.tracker import TrialView

BEST = "best"
"""Label of a strip's last column."""


@dataclass(frozen=True)
class Found:
    """A study that has scored trials."""

    label: str
    """The subject, or the study's name."""
    spec: StudySpec
    scored: Sequence[TrialView]
    winner: TrialView
    value: float


def write_summary(series: Series) -> list[Path]:
    """A table and, where a number was searched, a strip of pictures for each stage, in the series' folder.

    Studies that have no winner (yet, or because their objective has several values) are left out.

    Returns:
        The files.
    """
    stages: dict[str, list[Found]] = {}
    for member in series.members:
        if (found := _find(member)) is not None:
            stages.setdefault(member.stage, []).append(found)
    written: list[Path] = []
    for stage, group in stages.items():
        ending = f"-{stage}" if stage else ""
        file = series.root / f"summary{ending}.csv"
        write_atomically(file, table(group))
        written.append(file)
        if pictures := strip(group):
            from evaluation.grid import draw_grid

            picture = series.root / f"strip{ending}.png"
            temporary = picture.with_name(f".{picture.name}")
            draw_grid(pictures).save(temporary, format="PNG")
            temporary.replace(picture)
            written.append(picture)
    return written


def _find(member: Member) -> Found | None:
    spec, _ = member.load()
    if not has_study(spec) or len(spec.objective.names) > 1:
        return None
    if not feasible(trials := read_trials(spec)):
        return None
    winner, value = winning_trial(spec, trials)
    scored = [trial for trial in trials if trial.state == "COMPLETE"]
    return Found(member.subject or member.name, spec, scored, winner, value)


def table(group: Sequence[Found]) -> str:
    """A line of CSV for each study: its winner, what it scored, and what fresh seeds said of it."""
    rows = [dict(_row(found)) for found in group]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(found: Found) -> Iterator[tuple[str, object]]:
    yield from {"subject": found.label, "study": found.spec.name, "num_trials": len(found.scored)}.items()
    yield from {"winner": found.winner.number, "value": found.value}.items()
    paths = list(found.spec.search)
    for path, name in zip(paths, short_names(paths), strict=True):
        yield name, found.winner.params[path]
    result = found.winner.run.read_result()
    for name, score in (result.scores if result else {}).items():
        yield name, score.mean
        yield f"{name} standard error", score.standard_error
    confirmation = read_confirmation(find_contest(found.spec, found.scored))
    for one in confirmation.standings if confirmation else ():
        if one.trial == found.winner.number:
            yield "value on fresh seeds", one.value
        name = {None: "base", 0: "defaults"}.get(one.trial)
        if name and one.trial != found.winner.number:
            yield from {
                f"gain over {name}": -one.difference,
                f"{name} low": -one.high,
                f"{name} high": -one.low,
            }.items()


def strip(group: Sequence[Found]) -> Mapping[tuple[str, str], Path]:
    """Picture files by row and column: the searched number across, subjects down, each row's best at the end.

    A row has the first prompt's first picture, and its label says which prompt that is and where its best lies: the
    study's winner where that is in the row. Where rows have been judged at different places, the columns are the places
    that all of them have in common.
    """
    rows: dict[str, tuple[dict[float, TrialView], float]] = {}
    for found in group:
        line = _line(found.spec)
        for label, places in _rows(found, line).items() if line else ():
            won = [x for x, trial in places.items() if trial.number == found.winner.number]
            best = won[0] if won else max(places, key=lambda x: _rank(places[x]))
            prompt = found.spec.trial.evaluate.all_prompts[0]
            rows[f"{label}, best {line.rpartition('.')[2]} {best:.3g}: {prompt}"] = places, best
    common = sorted(set[float].intersection(*(set(places) for places, _ in rows.values()))) if rows else []
    pictures: dict[tuple[str, str], Path] = {}
    for label, (places, best) in rows.items():
        chosen = {f"{x:.3g}": places[x] for x in common} | {BEST: places[best]}
        for column, trial in chosen.items():
            if (file := next(iter(sorted(trial.run.samples.glob("0000_*.png"))), None)) is not None:
                pictures[label, column] = file
    return pictures


def _rank(trial: TrialView) -> tuple[float, float]:
    """Whoever keeps all bounds first, and then the largest value."""
    return -sum(trial.violations.values()), (trial.values or [0.0])[0]


def _line(spec: StudySpec) -> str:
    """The path of a study's continuous number; empty if it searches none."""
    return next((path for path, one in spec.search.items() if isinstance(one, RealParameter) and not one.step), "")


def _rows(found: Found, line: str) -> dict[str, dict[float, TrialView]]:
    """A study's trials along its continuous number, for each value of what else it searches."""
    others = [path for path in found.spec.search if path != line]
    rows: dict[str, dict[float, TrialView]] = {}
    for trial in found.scored:
        rest = ", ".join(f"{name} {trial.params[path]}" for path, name in zip(others, short_names(others), strict=True))
        rows.setdefault(f"{found.label} {rest}".strip(), {})[trial.params[line]] = trial
    return rows
