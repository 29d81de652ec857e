"""`records.jsonl`: what was measured on each picture of a run."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from trainers.config import Config
from trainers.errors import DataError
from trainers.rundir import Measured, write_atomically


class Record(Config):
    """What was measured on one picture."""

    prompt: str
    seed: int
    file: str
    """Path of the picture, relative to the run directory."""
    values: dict[str, Measured]
    """Raw value of each metric that judges such pictures; undefined is NaN, and `null` in the file."""


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Replace `path` by one line per record, atomically."""
    write_atomically(path, "".join(record.model_dump_json() + "\n" for record in records))


def read_records(path: Path) -> list[Record]:
    """Read what `write_records` wrote.

    Raises:
        DataError: There is no such file: the run has not been scored.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected the records of a run that was scored")
    return [Record.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def panel(records: Iterable[Record], metric: str) -> dict[tuple[str, int], float]:
    """One metric's value for each (prompt, seed) that it judges, as `evaluation.statistics` takes them."""
    return {(one.prompt, one.seed): one.values[metric] for one in records if metric in one.values}
