"""The files of one run: the only interface between a job and the rest of the world."""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from uuid import uuid4

import yaml
from pydantic import BeforeValidator, ValidationError

from trainers.config import Config
from trainers.errors import ConfigError, StorageError

AnyConfig = TypeVar("AnyConfig", bound=Config)

Measured = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number that may be undefined: NaN in memory, `null` in a JSON file."""


class Score(Config):
    """What one metric measured on one trial's samples; raw values, never rescaled."""

    mean: Measured
    """Mean over prompts of the means over each prompt's samples; undefined if no sample has a value."""
    standard_error: Measured
    """Standard error of `mean`, clustered by prompt; undefined for fewer than two prompts."""
    num_samples: int
    """Samples with a defined value."""
    num_undefined: int = 0
    """Samples for which the metric has no value; they are not part of `mean`."""
    model: str
    """Name and content hash of the model that made the number."""
    higher_is_better: bool = True


class RunResult(Config):
    """What a finished trial measured. Present if, and only if, the run succeeded."""

    scores: dict[str, Score]
    seconds: dict[str, float]
    """Wall-clock seconds per stage: start, load, train, sample, score."""
    peak_bytes: int
    """Largest memory use of the job's first rank: device memory on CUDA, resident memory on CPU."""
    versions: dict[str, str]
    """Package versions that made the result, and the project's git commit."""


class RunError(Config):
    """Why a run failed in a way that a retry would repeat."""

    reason: Literal["oom", "nan", "data", "config", "model", "checkpoint", "disk", "crash"]
    message: str
    step: int | None = None
    """Last optimizer step that was logged."""
    peak_bytes: int | None = None
    """Largest memory use of the rank that failed, as in `RunResult`; null if it had loaded nothing."""


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. Files are replaced atomically: a reader sees all of one or none."""

    path: Path

    @property
    def trial(self) -> Path:
        """What to run: the frozen trial and its hash."""
        return self.path / "trial.yaml"

    @property
    def events(self) -> Path:
        """Append-only progress, one JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def result(self) -> Path:
        """Present if, and only if, the run succeeded."""
        return self.path / "result.json"

    @property
    def error(self) -> Path:
        """Present if the run failed in a way that a retry would repeat."""
        return self.path / "error.json"

    @property
    def log(self) -> Path:
        """What the job printed."""
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        """Everything needed to go on training."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter in the format that diffusers loads."""
        return self.path / "adapter"

    @property
    def snapshots(self) -> Path:
        """Adapters of earlier steps, each in a folder that is named by its step."""
        return self.path / "snapshots"

    @property
    def samples(self) -> Path:
        """Scored pictures, and `grid.png`."""
        return self.path / "samples"

    @property
    def records(self) -> Path:
        """One JSON object per sample: prompt, seed, file and each metric's value."""
        return self.path / "records.jsonl"

    def write(self, path: Path, content: Config) -> None:
        """Write `content` as JSON, atomically."""
        write_atomically(path, content.model_dump_json(indent=2) + "\n")

    def read_result(self) -> RunResult | None:
        """What the run measured; None if it did not succeed, or not yet. Raises StorageError."""
        return read_json(self.result, RunResult)

    def read_error(self) -> RunError | None:
        """Why the run failed; None if it did not. Raises StorageError."""
        return read_json(self.error, RunError)

    def append(self, event: str, **values: Any) -> None:
        """Add one line to `events`; `time` is this machine's clock in seconds since 1970."""
        self.path.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"time": time.time(), "event": event, **values}).encode() + b"\n"
        with self.events.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else b"\n" + line  # after one that a crash cut short
            file.write(line)

    def read_events(self, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (byte offset after the line, event) for every complete line from `offset` on.

        A line that is still being written is left for next time. A line that a crash cut short, and that a restarted
        job wrote past, is skipped.
        """
        if not self.events.exists():
            return
        with self.events.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                yield offset, event


def freeze(tree: dict[str, Any]) -> tuple[str, str]:
    """The text of a `trial.yaml` and the sha256 that the worker must find in it."""
    body = yaml.safe_dump(tree, sort_keys=True, allow_unicode=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f"sha256: {digest}\n{body}", digest


def thaw(path: Path, expected: str | None = None) -> dict[str, Any]:
    """Read a frozen trial.

    Raises:
        ConfigError: The file was edited, or is not the one whose hash is `expected`.
    """
    _, _, body = path.read_bytes().partition(b"\n")
    digest, recorded = hashlib.sha256(body).hexdigest(), recorded_hash(path)
    if digest != recorded or (expected is not None and expected != digest):
        raise ConfigError(
            f"{path}: content hash is {digest[:12]}, expected {(expected or recorded)[:12]}; a frozen trial must not "
            "be edited: change the study file and start a new study"
        )
    return yaml.safe_load(body)


def recorded_hash(path: Path) -> str:
    """The sha256 that a frozen trial says it has."""
    with path.open("rb") as file:
        return file.readline().decode(errors="replace").strip().removeprefix("sha256: ")


def read_json(path: Path, kind: type[AnyConfig]) -> AnyConfig | None:
    """What `RunDir.write` wrote, or None if there is no such file.

    Raises:
        StorageError: It is damaged, or another version's.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        problem = ": ".join([".".join(map(str, first["loc"])), first["msg"]] if first["loc"] else [first["msg"]])
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    raise StorageError(f"{path}: got {problem}; expected {kind.__name__} as this version writes it; restore the file")


def name_temporary(path: Path) -> Path:
    """A file beside `path` that is to replace it; nobody else writes one of this name, not even on another machine."""
    return path.with_name(f".{path.name}.{uuid4().hex}.tmp")


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` so that a reader, or a crash, sees the old or the new file and nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = name_temporary(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:  # on a full disk what is half written takes room that others need
        temporary.unlink(missing_ok=True)
        raise
