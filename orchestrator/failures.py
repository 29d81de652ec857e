"""Why trials failed, for people: everything that is known, in one file in the run directory."""

from __future__ import annotations

import os
from itertools import takewhile
from typing import TYPE_CHECKING

from trainers.config import Config
from trainers.errors import ProjectError
from trainers.rundir import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from optuna.trial import FrozenTrial

    from trainers.rundir import RunDir

_TAIL_LINES = 20
_TAIL_BYTES = 16 * 1024
_SHOWN_LINES = 3
_MAX_LINE = 240
_MAX_FIRST = 3
_MAX_IN_A_ROW = 10


class StudyStoppedError(ProjectError):
    """A study failed so often, and so alike, that going on would waste the time of the next trials."""


class Failure(Config):
    """A trial that was scored by nobody, and what it left behind."""

    reason: str
    """oom, nan, data, config, model, checkpoint, disk, crash or lost."""
    message: str
    step: int | None
    """Last optimizer step that was logged; null if none was."""
    peak_bytes: int | None
    """Largest memory use that was logged; null if none was."""
    jobs_lost: int
    """How often the trial's job ended without an answer."""
    log_tail: tuple[str, ...]
    """The last lines of `log.txt`."""


def failure_file(run: RunDir) -> Path:
    """Present if the trial failed for good, or was pruned because it ran out of memory or of finite numbers."""
    return run.path / "failure.json"


def read_failure(run: RunDir) -> Failure | None:
    """What is known of a failed trial; None of any other."""
    return read_json(failure_file(run), Failure)


def note_failure(run: RunDir, reason: str, message: str, jobs_lost: int, peak_bytes: int | None = None) -> None:
    """Write down what is known of a trial that failed just now; a repetition writes the same.

    Args:
        run: The trial's.
        reason: Its kind in one word.
        message: In a sentence.
        jobs_lost: How often its job ended without an answer.
        peak_bytes: Largest memory use when it failed, if the job could say; what it logged before counts too.
    """
    step, logged = _last_seen(run)
    failure = Failure(
        reason=reason,
        message=message,
        step=step,
        peak_bytes=max((known for known in (peak_bytes, logged) if known is not None), default=None),
        jobs_lost=jobs_lost,
        log_tail=tuple(_tail(run.log)),
    )
    run.write(failure_file(run), failure)


def describe(number: int, failure: Failure) -> Iterator[str]:
    """A few lines: what, when, with how much memory, and the end of the log."""
    step = f" after step {failure.step}" if failure.step is not None else ""
    peak = f", at most {failure.peak_bytes / 2**30:.3g} GiB in use" if failure.peak_bytes else ""
    yield f"trial {number}: {failure.reason}{step}{peak}: {failure.message}"
    for line in failure.log_tail[-_SHOWN_LINES:]:
        yield f"    {line}"


def check_hope(root: Path, finished: Sequence[FrozenTrial]) -> None:
    """Stop a study whose trials fail, one after another, for the same reason from the start or for any reason later.

    Args:
        root: The study's folder.
        finished: Trials that ended while this controller ran: the causes of earlier failures may have been mended.

    Raises:
        StudyStoppedError: They do.
    """
    failures = list(takewhile(lambda trial: trial.state.name == "FAIL", reversed(finished)))
    first = {(trial.user_attrs.get("reason"), trial.user_attrs.get("message")) for trial in failures}
    from_the_start = len(failures) == len(finished) >= _MAX_FIRST and len(first) == 1
    if from_the_start or len(failures) >= _MAX_IN_A_ROW:
        last = failures[0].user_attrs
        what = f"the first {len(failures)} trials" if from_the_start else f"{len(failures)} trials in a row"
        raise StudyStoppedError(
            f"{root}: got {what} that failed, the last with {last.get('reason')}: {last.get('message')}; "
            "expected results; mend the cause and run the study again"
        )


def _last_seen(run: RunDir) -> tuple[int | None, int | None]:
    step = peak = None
    for _, event in run.read_events():
        if event["event"] == "train":
            step = event["step"]
        if (seen := event.get("peak_bytes")) is not None:
            peak = max(seen, peak or 0)
    return step, peak


def _tail(log: Path) -> list[str]:
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    return [line[:_MAX_LINE] for line in text.splitlines()[-_TAIL_LINES:]]
