"""What a study begins with: its defaults, and what its `warm_start:` names. Only files are read.

A trial of an earlier study that this one would run with the very same frozen config has its results here too: its run
directory is copied (by links, which take no room), and nothing is computed. One that differs in anything is run again.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from orchestrator.identity import differences, leaves, listed
from orchestrator.spec import TrialSpec, get_value
from trainers.errors import ConfigError
from trainers.rundir import RunDir, thaw, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import optuna

    from orchestrator.search import Value
    from orchestrator.spec import StudySpec

log = logging.getLogger(__name__)

_BEGINNING = "beginning"
_KEPT_BACK = {"checkpoints", "lock", "logs", "trial.yaml", "error.json", "failure.json", "result.json"}
_GROWING = {"events.jsonl", "log.txt"}
"""Appended to: a link would change the earlier study's."""


@dataclass(frozen=True)
class First:
    """One of a study's first trials."""

    params: dict[str, Value]
    run: Path | None = None
    """The earlier run directory that holds its results."""


@dataclass
class Beginning:
    """A study's first trials, by number, and what people should know of them."""

    trials: list[First]
    notes: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class _Known:
    """A scored trial of the earlier study, as it would be in this one."""

    run: RunDir
    params: dict[str, Value]
    changed: dict[str, str]


def find_beginning(spec: StudySpec) -> Beginning:
    """The defaults, then parameters that are named, then trials of the earlier study by their numbers, each once.

    Raises:
        ConfigError: There is no such study, none of its trials can be taken over, or more than there is room for.
    """
    found = Beginning([First(spec.defaults())])
    warm = spec.warm_start
    if warm is None:
        return found
    wanted = [First(spec.defaults() | params) for params in warm.params]
    if warm.study is not None:
        known, left_out = _read(spec, warm.study)
        found.notes = list(_notes(warm.study, known, left_out))
        wanted += [First(one.params, None if one.changed else one.run.path) for one in known]
    for one in wanted:
        _add(found.trials, one)
    if len(found.trials) > spec.num_trials:
        raise ConfigError(
            f"warm_start: got {len(found.trials)} trials to begin with, the defaults among them; expected at most "
            f"limits.trials, {spec.num_trials}; raise that, or lower warm_start.best"
        )
    return found


def remember_beginning(spec: StudySpec, study: optuna.Study) -> Beginning:
    """What the study began with when it was opened first: the earlier one may have gone on since.

    Raises:
        ConfigError: It has not begun, and cannot.
    """
    stored = study.user_attrs.get(_BEGINNING)
    if stored is None:
        found = find_beginning(spec)
        trials = [[one.params, one.run and str(one.run)] for one in found.trials]
        study.set_user_attr(_BEGINNING, {"trials": trials, "notes": found.notes})
        return found
    trials = [First(params, spec.root.__class__(run) if run else None) for params, run in stored["trials"]]
    return Beginning(trials, stored["notes"])


def take_results(beginning: Beginning, number: int, run: RunDir) -> None:
    """Give trial `number` the results of the earlier one that is the same; a repetition changes nothing."""
    source = beginning.trials[number].run if number < len(beginning.trials) else None
    if source is None or run.result.exists():
        return
    result = source / run.result.name
    if not result.exists():
        log.warning("trial %d: %s has gone, so the trial is run again", number, source)
        return
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        inside = file.relative_to(source)
        if inside.parts[0] not in _KEPT_BACK and not inside.parts[0].startswith("."):
            _copy(file, run.path / inside)
    write_atomically(run.result, result.read_text(encoding="utf-8"))  # last: it says that all is there
    log.info("trial %d: taken over from %s", number, source)


def _add(trials: list[First], one: First) -> None:
    """Each once; the defaults may have results."""
    for place, other in enumerate(trials):
        if other.params == one.params:
            trials[place] = First(other.params, other.run or one.run)
            return
    trials.append(one)


def _read(spec: StudySpec, folder: Path) -> tuple[list[_Known], dict[str, str]]:
    """Trials that can be taken over, and of the others why not."""
    runs = [RunDir(path) for path in sorted((folder / "trials").glob("*"))]
    if not runs:
        raise ConfigError(f"warm_start.study: got {folder}; expected the folder of a study, with trials in it")
    known: list[_Known] = []
    newest: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for run in runs:
        try:
            known.append(_known(spec, run, newest))
        except ConfigError as error:
            left_out[run.path.name] = str(error)
    if not known:
        name, why = next(iter(left_out.items()))
        raise ConfigError(
            f"warm_start.study: got {folder}, none of whose {len(runs)} trials can be taken over, the first ({name}) "
            f"because {why}; expected scored trials inside of `search`"
        )
    best = spec.warm_start.best if spec.warm_start else None
    if best is not None:
        chosen = sorted(known, key=lambda one: -_value(spec, one.run))[:best]
        known = [one for one in known if one in chosen]
    return known, left_out


def _known(spec: StudySpec, run: RunDir, newest: dict[str, float]) -> _Known:
    if not run.result.exists():
        raise ConfigError("it was not scored")
    tree = _tree(thaw(run.trial))
    params = {path: get_value(tree, path) for path in spec.search}
    for path, value in params.items():
        if not spec.search[path].contains(value):
            raise ConfigError(f"{path} is outside of what is searched")
    changed = differences(tree, spec.resolve(params).model_dump(mode="json"))
    return _Known(run, params, changed | _rewritten(tree, run, newest))


def _rewritten(tree: Mapping[str, Any], run: RunDir, newest: dict[str, float]) -> dict[str, str]:
    """Files and folders of the trial that are newer than it; `newest` remembers what was looked at."""
    named = {key: text for key, text in leaves(tree) if isinstance(text, str) and text.startswith("/")}
    for text in named.values():
        if text not in newest and (path := Path(text)).exists():
            newest[text] = max(file.stat().st_mtime for file in (path, *path.rglob("*")) if file.exists())
    began = run.trial.stat().st_mtime
    return {key: "was changed after the trial began" for key, text in named.items() if newest.get(text, 0.0) > began}


def _tree(frozen: Mapping[str, Any]) -> dict[str, Any]:
    """What a frozen trial means to this version of the code."""
    try:
        return TrialSpec.model_validate(frozen).model_dump(mode="json")
    except ValidationError as error:
        raise ConfigError("it is no valid trial any more") from error


def _value(spec: StudySpec, run: RunDir) -> float:
    """By this study's objective; the worst if it was not measured. Raises StorageError."""
    result = run.read_result()
    scores = result.scores if result else {}
    try:
        value = spec.objective.values(scores)[0]
    except KeyError:
        return -float("inf")
    return value if value == value else -float("inf")  # noqa: PLR0124  undefined is the worst


def _notes(folder: Path, known: Sequence[_Known], left_out: Mapping[str, str]) -> Iterator[str]:
    same = [one for one in known if not one.changed]
    yield f"warm start: {len(same)} trials of {folder} are taken over with their results"
    examples = {tuple(one.changed): listed(one.changed) for one in known}
    for paths, count in Counter(tuple(one.changed) for one in known if one.changed).items():
        yield f"warm start: {count} are run again, because {examples[paths]}{' in one of them' * (count > 1)}"
    for why, count in Counter(left_out.values()).items():
        yield f"warm start: {count} left out, because {why}"


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # of a controller that was killed here
    if file.name not in _GROWING:
        try:
            os.link(file, target)
        except OSError:  # another disk
            pass
        else:
            return
    shutil.copy2(file, target)
