"""What `status` and `best` show."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from rich.table import Table

from orchestrator.failures import describe, read_failure
from orchestrator.front import front
from orchestrator.tracker import COUNTED_STATES
from orchestrator.yaml import dump
from trainers.errors import ConfigError, StorageError
from trainers.finished import LORA_FILE
from trainers.rundir import RunResult, write_atomically

if TYPE_CHECKING:
    from orchestrator.spec import StudySpec
    from orchestrator.tracker import TrialView

_STYLES = {"COMPLETE": "green", "RUNNING": "cyan", "PRUNED": "yellow", "FAIL": "red"}
_MAX_REASON = 70
_MAX_FAILURES = 5


def status_table(spec: StudySpec, trials: Sequence[TrialView], title: str | None = None) -> Table:
    """A row for every trial: state, parameters, values, scores with standard errors, duration and what went wrong.

    Args:
        spec: The study.
        trials: What to list.
        title: null says how many trials of the study are done.
    """
    scores = list(spec.trial.evaluate.metrics)
    counted = sum(trial.state in COUNTED_STATES for trial in trials)
    title = title or f"{spec.name}: {counted} of {spec.num_trials} trials"
    table = Table(title=title, title_justify="left")
    table.add_column("trial", justify="right")
    table.add_column("state", no_wrap=True)
    for name in (*short_names(list(spec.search)), *spec.objective.names, *scores, "duration"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("reason")
    for trial in trials:
        result = trial.run.read_result()
        cells = [_cell(trial.params.get(path)) if path in trial.params else "" for path in spec.search]
        cells += [f"{value:.4g}" for value in trial.values] if trial.values else [""] * len(spec.objective.names)
        cells += [_score(result, name) for name in scores]
        cells.append(_duration(trial))
        table.add_row(str(trial.number), trial.state.lower(), *cells, _reason(trial), style=_STYLES.get(trial.state))
    return table


def failure_lines(trials: Sequence[TrialView]) -> list[str]:
    """What is known of the trials that failed last, with the ends of their logs."""
    known = [(trial.number, read_failure(trial.run)) for trial in trials if trial.state in {"FAIL", "PRUNED"}]
    failed = [(number, failure) for number, failure in known if failure is not None]
    lines = [line for number, failure in failed[-_MAX_FAILURES:] for line in describe(number, failure)]
    if len(failed) > _MAX_FAILURES:
        lines.insert(0, f"the last {_MAX_FAILURES} of {len(failed)} failures; each has a failure.json in its folder")
    return lines


def best_trial(spec: StudySpec, trials: Sequence[TrialView]) -> tuple[TrialView, float]:
    """The scored trial with the largest value among those that keep every bound, and that value.

    Raises:
        StorageError: No trial has been scored yet, or each breaks a bound.
        ConfigError: The objective has several values: no trial is the best.
    """
    if len(spec.objective.names) > 1:
        raise ConfigError(
            f"{spec.root}: got several values ({', '.join(spec.objective.names)}), which have a front and no winner; "
            "expected an objective of one value; see `best`"
        )
    winner = won(spec, trials)[0]
    assert winner.values is not None
    return winner, winner.values[0]


def won(spec: StudySpec, trials: Sequence[TrialView]) -> list[TrialView]:
    """The trials that no other one beats: one, or the front of several values, by the first of them.

    Raises:
        StorageError: No trial has been scored yet, or each breaks a bound.
    """
    if winners := front(trials):
        return winners
    scored = [trial for trial in trials if trial.state == "COMPLETE"]
    if not scored:
        raise StorageError(f"{spec.root}: got no scored trial; expected at least one; see `status`")
    nearest = min(scored, key=lambda trial: sum(trial.violations.values()))
    raise StorageError(
        f"{spec.root}: got {len(scored)} scored trials that each break a bound, the nearest trial {nearest.number}, "
        f"which {nearest.reason}; expected one that keeps all; run more trials, or loosen objective.subject_to in a "
        "new study"
    )


def write_best(spec: StudySpec, winners: Sequence[TrialView]) -> tuple[str, Mapping[str, Any]]:
    """Write `best_params.yaml` into the study's folder, if that can be written; return what to say, and the content.

    Of one value, it describes the winner; of several, `front` is a list of such descriptions. `draw` is the command
    that draws with all of it, guidance too; `use` loads an adapter into a plain pipeline of diffusers, where that can.
    """
    described = [_described(spec, winner) for winner in winners]
    content = described[0] if len(spec.objective.names) == 1 else {"front": described}
    path = spec.root / "best_params.yaml"
    plain = json.loads(json.dumps(content))
    try:
        write_atomically(path, dump(plain))
    except OSError as error:
        return f"not written: {path}: {error.strerror}", plain
    return f"written: {path}", plain


def _described(spec: StudySpec, winner: TrialView) -> dict[str, Any]:
    result = winner.run.read_result()
    if result is None:
        raise StorageError(
            f"{winner.run.result}: no such file; expected the scores of trial {winner.number}; restore it"
        )
    values = dict(zip(spec.objective.names, winner.values or (), strict=True))
    adapter = winner.run.adapter
    loads = {"use": f"pipeline.load_lora_weights({str(adapter)!r})"} if (adapter / LORA_FILE).is_file() else {}
    return {
        "trial": winner.number,
        **(values if len(values) == 1 else {"values": values}),
        "params": winner.params,
        "scores": {
            name: {"mean": score.mean, "standard_error": score.standard_error} for name, score in result.scores.items()
        },
        "adapter": str(adapter),
        "frozen_trial": str(winner.run.trial),
        "draw": shlex.join(["python", "-m", "orchestrator", "generate", str(winner.run.path)]),
        **loads,
    }


def short_names(paths: Sequence[str]) -> list[str]:
    """The last words of dotted paths, as many as it takes to tell them apart."""

    def last(path: str, count: int) -> str:
        return ".".join(path.split(".")[-count:])

    def num_words(path: str) -> int:
        others = [other for other in paths if other != path]
        lengths = range(1, path.count(".") + 2)
        return next((n for n in lengths if all(last(other, n) != last(path, n) for other in others)), lengths[-1])

    return [last(path, num_words(path)) for path in paths]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _score(result: RunResult | None, name: str) -> str:
    if result is None or name not in result.scores:
        return ""
    score = result.scores[name]
    return f"{score.mean:.4f}±{score.standard_error:.4f}"


def _duration(trial: TrialView) -> str:
    if trial.start is None:
        return ""
    end = trial.end or datetime.now(UTC)
    return str(timedelta(seconds=round((end - trial.start).total_seconds())))


def _reason(trial: TrialView) -> str:
    reason = trial.reason or ""
    where = f"; see {trial.run.log}" if reason and trial.state == "FAIL" else ""
    return (reason if len(reason) <= _MAX_REASON else reason[: _MAX_REASON - 1] + "…") + where
