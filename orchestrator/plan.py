"""Before anything starts: is everything there, and does it fit?"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from orchestrator.beginning import find_beginning
from orchestrator.launchers.local import LocalLauncher, gpu_bytes
from orchestrator.ledger import has_study, read_trials
from orchestrator.search import CategoricalParameter, Value
from orchestrator.tracker import COUNTED_STATES
from trainers.errors import ConfigError, DataError, LaunchError, ModelError, StorageError

if TYPE_CHECKING:
    from orchestrator.spec import StudySpec, TrialSpec
    from orchestrator.yaml import Document, Location
    from trainers.rundir import RunResult

_PROCESS_BYTES = 700 * 2**20
"""Resident memory of a rank with torch, diffusers, transformers and peft imported and no model loaded (measured)."""
_CHECKPOINTS = 2
"""How many are kept; one more exists while the next is written."""
_FLOAT = 4
"""Bytes of a trainable weight, and of each of its optimizer moments."""
_ADAM_COPIES = 3
"""A weight and its two moments."""


def check(spec: StudySpec, document: Document) -> None:
    """Look for everything a study needs, without torch and without starting a job.

    Raises:
        ConfigError: Something is missing or of another kind; in one line with file, dotted path and what to do.
        StorageError: The output cannot be written.
    """
    try:
        spec.launcher.check()
    except LaunchError as error:
        key = str(error).partition(":")[0]
        raise ConfigError(f"{document.where(tuple(key.split('.')))}: {error}") from error
    for params in _checked_params(spec):
        _check_trial(spec.resolve(params), document, params)
    _check_beginning(spec, document)
    _check_output(spec.output, document)


def _checked_params(spec: StudySpec) -> Iterable[Mapping[str, Value]]:
    """The defaults, and every choice that may name a file."""
    yield {}
    for path, parameter in spec.search.items():
        if isinstance(parameter, CategoricalParameter):
            yield from ({path: choice} for choice in parameter.choices if isinstance(choice, str))


def _check_trial(trial: TrialSpec, document: Document, params: Mapping[str, Value]) -> None:
    where: Location = ("trial", "train")
    try:
        trial.train.check()
        where = ("trial", "evaluate")
        trial.evaluate.check()
        trial.evaluate.check_model(trial.train.backbone)
        trial.train.check_prompts(trial.evaluate.all_prompts, trial.evaluate.resolution)
        where = ("trial", "train")
        _check_references(trial)
        if trial.adapter is not None:
            where = ("trial", "adapter")
            trial.train.check_finished(trial.adapter, weak=trial.evaluate.guidance.needs_weak)
    except (ModelError, DataError, ConfigError) as error:
        if where[-1] == "train" and not isinstance(error, ConfigError):
            where = (*where, "data" if isinstance(error, DataError) else "backbone")
        if params:
            where = ("search", next(iter(params)))
        raise ConfigError(f"{document.where(where)}: {'.'.join(map(str, where))}: {error}") from error


def _check_references(trial: TrialSpec) -> None:
    if trial.evaluate.needs_references and not trial.train.data.split().held_out:
        raise DataError(
            "got no held-out pictures; expected some, because a metric compares with them: set holdout or "
            "holdout_path, or remove the metric"
        )


def _check_beginning(spec: StudySpec, document: Document) -> None:
    if spec.warm_start is None or has_study(spec):  # a study that has begun remembers with what
        return
    try:
        find_beginning(spec)
    except ConfigError as error:
        raise ConfigError(f"{document.where(('warm_start',))}: {error}") from error


def _check_output(output: Path, document: Document) -> None:
    existing = next(parent for parent in (output, *output.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):  # permissions alone do not tell, least of all to root
            pass
    except OSError as error:
        raise StorageError(
            f"{document.where(('output',))}: output: got {output}; expected a folder that can be written, and "
            f"{existing} is not: {(error.strerror or str(error)).lower()}"
        ) from error


@dataclass(frozen=True)
class Estimate:
    """What the rest of a study takes."""

    trials_left: int
    seconds_per_trial: float | None
    """Mean of the finished trials, start-up included; None before the first one has finished."""
    disk_bytes: int
    disk_formula: str
    memory_bytes: int
    """Of each rank, where the model lives: a lower bound before the first trial has finished."""
    memory_formula: str
    on_gpu: bool


def estimate(spec: StudySpec, finished: Iterable[tuple[Path, RunResult]], counted: int) -> Estimate:
    """Measured where trials have finished, computed from the files' sizes otherwise.

    Args:
        spec: The study.
        finished: Run directory and result of every scored trial.
        counted: Trials that count towards the limit.
    """
    done, left = list(finished), max(0, spec.num_trials - counted)
    results = [result for _, result in done]
    memory, memory_formula = _memory(spec, results)
    sizes = [(_size(path), _size(path / "checkpoints")) for path, _ in done]
    disk, disk_formula = _disk(spec, [size for size, _ in sizes])
    deleted = _deleted(spec, sizes, left)
    once = _training_disk(spec, {}) if spec.shares_training and left and not done else 0
    return Estimate(
        trials_left=left,
        seconds_per_trial=sum(_seconds(spec, r) for r in results) / len(results) if results else None,
        disk_bytes=once + disk * left - deleted,
        disk_formula=f"training {human(once)} + " * bool(once)
        + f"{left} trials x {disk_formula}"
        + f" - {human(deleted)} of checkpoints that limits.disk_gib deletes" * bool(deleted),
        memory_bytes=memory,
        memory_formula=memory_formula,
        on_gpu=bool(_gpus(spec)),
    )


def check_fits(spec: StudySpec, needed: Estimate) -> None:
    """Refuse a study that cannot end.

    Raises:
        StorageError: The disk has no room for what is left to do.
        LaunchError: The model does not fit into this machine's memory, if jobs run here.
    """
    existing = next(parent for parent in (spec.output, *spec.output.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed.disk_bytes > free:
        raise StorageError(
            f"output: got {human(free)} of free disk in {existing}; expected {human(needed.disk_bytes)} "
            f"({needed.disk_formula}); free some, lower limits.trials, or set another output"
        )
    if not isinstance(spec.launcher, LocalLauncher):
        return
    devices = _gpus(spec)
    have = min(devices.values()) if devices else psutil.virtual_memory().total
    ranks = 1 if devices else spec.launcher.num_processes * spec.limits.parallel
    if needed.memory_bytes * ranks > have:
        raise LaunchError(
            f"launcher: got {human(have)} of {'device ' if devices else ''}memory; expected "
            f"{human(needed.memory_bytes * ranks)} ({ranks} x {needed.memory_formula}); use fewer processes, a lower "
            "precision or a smaller model"
        )


def human(num_bytes: float) -> str:
    """A size for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"


def _gpus(spec: StudySpec) -> Mapping[int, int]:
    present = gpu_bytes()
    chosen = spec.launcher.gpus if isinstance(spec.launcher, LocalLauncher) else None
    return present if chosen is None else {index: present[index] for index in chosen}


def _memory(spec: StudySpec, results: list[RunResult]) -> tuple[int, str]:
    if results:
        return max(result.peak_bytes for result in results), "the largest use of a finished trial"
    train = spec.trial.train
    networks = train.backbone.weight_shapes().values()
    num_weights = sum(math.prod(shape) for network in networks for shape in network.values())
    weights = num_weights * (_FLOAT if train.precision == "fp32" else _FLOAT // 2)
    trained = train.num_trainable() * _FLOAT * (_ADAM_COPIES + 1)
    process = 0 if _gpus(spec) else _PROCESS_BYTES
    parts = f"model {human(weights)} + adapter, gradients and Adam {human(trained)} + process {human(process)}"
    return weights + trained + process, f"({parts} + activations, which are not known yet)"


def _seconds(spec: StudySpec, result: RunResult) -> float:
    """What a further trial like this one takes."""
    done = {"load", "train"} if spec.shares_training else set[str]()
    return sum(seconds for stage, seconds in result.seconds.items() if stage not in done)


def _training_disk(spec: StudySpec, params: Mapping[str, Value]) -> int:
    """An adapter, those of earlier steps, and the checkpoints that lead to it."""
    train = spec.resolve(params).train
    return train.num_trainable() * _FLOAT * train.num_exports + _checkpoint_disk(spec, params)


def _checkpoint_disk(spec: StudySpec, params: Mapping[str, Value]) -> int:
    return spec.resolve(params).train.num_trainable() * _FLOAT * _ADAM_COPIES * (_CHECKPOINTS + 1)


def _deleted(spec: StudySpec, sizes: list[tuple[int, int]], left: int) -> int:
    """What `limits.disk_gib` takes away of the checkpoints of the trials that are left.

    `sizes` are those of finished trials, with their checkpoints and of these alone.
    """
    limits = spec.limits
    if limits.disk_gib is None or spec.shares_training or spec.trial.adapter:
        return 0
    if sizes:
        each = max(size for size, _ in sizes) - max(size - checkpoints for size, checkpoints in sizes)
    else:
        each = max(_checkpoint_disk(spec, corner) for corner in _extremes(spec))
    kept = max(limits.disk_gib * 2**30, each * (limits.keep + len(limits.pinned)))
    room = max(0, int(kept) - sum(checkpoints for _, checkpoints in sizes))
    return max(0, each * (left - limits.parallel) - room)  # trials that run have theirs


def _disk(spec: StudySpec, sizes: list[int]) -> tuple[int, str]:
    if sizes:
        return max(sizes), f"{human(max(sizes))}, the largest finished one"
    evaluate = spec.trial.evaluate
    pictures = len(evaluate.all_prompts) * len(evaluate.seeds) * 2 * evaluate.resolution**2 * 3  # and once in the grid
    if spec.shares_training or spec.trial.adapter:
        return pictures, f"pictures of at most {human(pictures)}"
    trained = max(_training_disk(spec, corner) for corner in _extremes(spec))
    return trained + pictures, f"(adapter and checkpoints {human(trained)} + pictures at most {human(pictures)})"


def _extremes(spec: StudySpec) -> Iterable[Mapping[str, Value]]:
    yield {}
    for path, parameter in spec.search.items():
        yield from ({path: value} for value in parameter.corners())


def _size(folder: Path) -> int:
    files = (path.stat() for path in folder.rglob("*") if path.is_file())
    return sum(file.st_size for file in files if file.st_nlink == 1)  # an adapter that trials share lies elsewhere too


def estimate_rest(spec: StudySpec) -> Estimate:
    """What the study still has to do, measured on the trials it has finished."""
    trials = read_trials(spec) if has_study(spec) else []
    results = [(trial.run.path, trial.run.read_result()) for trial in trials if trial.state == "COMPLETE"]
    counted = sum(trial.state in COUNTED_STATES for trial in trials)
    return estimate(spec, [(path, result) for path, result in results if result is not None], counted)
