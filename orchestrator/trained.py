"""Training that trials share: done once, kept by what determines it, and waited for by whoever comes second."""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from typing_extensions import override

from trainers.config import Config
from trainers.errors import ConfigError, NonFiniteError
from trainers.rundir import RunDir, write_atomically

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from accelerate import Accelerator

    from orchestrator.spec import TrialSpec
    from trainers.cache import Cache

log = logging.getLogger(__name__)

_VERSION = "1"
"""Changes when the same words would train something else."""
_POLL_SECONDS = 1.0


class Trained(Config):
    """Says that a training has ended, and which trial's job did the last of it."""

    trial: str
    """Its run directory: where the curves are."""


@dataclass(frozen=True)
class SharedRun(RunDir):
    """A run that keeps what it trains where others find it; its events and pictures are its own."""

    folder: Path

    @property
    @override
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    @override
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def trained(self) -> Path:
        """Present if, and only if, training has ended."""
        return self.folder / "trained.json"


def train_once(spec: TrialSpec, run: RunDir, folder: Path, cache: Path, accelerator: Accelerator) -> Path:
    """Train what `spec` says, unless that was done; what another job has begun is waited for, or taken over.

    Args:
        spec: The trial.
        run: Gets the events.
        folder: Of all trainings; this one is kept in a folder of it, by what determines it.
        cache: Folder of frozen work that all studies share.
        accelerator: This process's device and its peers.

    Returns:
        The adapter's folder.

    Raises:
        ConfigError: Training diverged, which no parameter of a trial can change.
        ModelError, DataError, CheckpointError: See `trainers.errors`.
    """
    from trainers.cache import Cache
    from trainers.train import train

    shared = SharedRun(run.path, folder / training_key(spec, Cache(cache)))
    with _turn(shared, accelerator) as is_ours:
        if is_ours:
            try:
                train(spec.train, shared, spec.seed, cache, accelerator)
            except NonFiniteError as error:
                raise ConfigError(f"the training that all trials share diverged: {error}") from error
            if accelerator.is_main_process:
                shared.write(shared.trained, Trained(trial=str(run.path)))
                shutil.rmtree(shared.checkpoints, ignore_errors=True)
            accelerator.free_memory()
    return shared.adapter


def training_key(spec: TrialSpec, cache: Cache) -> str:
    """What determines the trained weights: the trial's `train` and `seed`, and the contents of all files they name."""
    from trainers.cache import digest

    tree = spec.train.model_dump(mode="python")
    split = spec.train.data.split()
    examples = [_describe(example, cache) for example in (*split.train, *split.held_out)]
    return digest(_VERSION, str(spec.seed), *_leaves(tree, cache), *examples)


def place_adapter(source: Path, target: Path) -> None:
    """Let a run directory hold the adapter that it draws with: the same files, which cost no disk where that can be."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(file, temporary)
        except OSError:  # another disk
            shutil.copy2(file, temporary)
        temporary.replace(place)


@contextmanager
def _turn(shared: SharedRun, accelerator: Accelerator) -> Generator[bool]:
    """Whether this job is the one that trains; returns when that is known, or when another one has done it.

    The first process holds a lock, which a kill lets go of; the others read whose it is, because no collective call may
    last as long as somebody else's training.
    """
    token = f"{shared.path} {os.environ.get('TORCHELASTIC_RUN_ID', '')}"
    owner = shared.folder / "owner"
    if not accelerator.is_main_process:
        while not shared.trained.exists() and not (owner.exists() and owner.read_text(encoding="utf-8") == token):
            time.sleep(_POLL_SECONDS)
        yield not shared.trained.exists()
        return
    shared.folder.mkdir(parents=True, exist_ok=True)
    with (shared.folder / "lock").open("w", encoding="utf-8") as lock:
        said = False
        while not shared.trained.exists() and not _try(lock.fileno()):
            if not said:
                log.info("another trial trains the same in %s; waiting for it", shared.folder)
                said = True
            time.sleep(_POLL_SECONDS)
        is_ours = not shared.trained.exists()
        if is_ours:
            write_atomically(owner, token)
        yield is_ours


def _try(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leaves(tree: object, cache: Cache, above: str = "") -> Iterator[str]:
    """Every value by its place; a path stands for the contents that it leads to."""
    if isinstance(tree, dict):
        for key, value in sorted(cast("dict[str, Any]", tree).items()):
            yield from _leaves(value, cache, f"{above}.{key}")
    elif isinstance(tree, list | tuple):
        for place, value in enumerate(cast("list[Any]", tree)):
            yield from _leaves(value, cache, f"{above}.{place}")
    else:
        yield f"{above}={_contents(tree, cache) if isinstance(tree, Path) else tree!r}"


def _contents(path: Path, cache: Cache) -> str:
    if path.is_file():
        return cache.hash_files([path])
    if not path.is_dir():  # a pattern of several files; those that it means are among the examples
        return path.name
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return f"{[str(file.relative_to(path)) for file in files]} {cache.hash_files(files)}"


def _describe(example: Any, cache: Cache) -> str:
    """An example and its files."""
    values = {field.name: getattr(example, field.name) for field in dataclasses.fields(example)}
    return " ".join(_leaves(values, cache))
