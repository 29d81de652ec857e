"""What a tracker is: somewhere else to look at a study. The files in the run directories stay the truth."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from trainers.config import Choice
from trainers.rundir import RunDir

FINAL_STATES = frozenset({"COMPLETE", "PRUNED", "FAIL"})
"""Optuna's names of the states in which a trial changes no more."""
COUNTED_STATES = frozenset({"COMPLETE", "PRUNED"})
"""Those of trials that count towards a study's limit."""


@dataclass(frozen=True)
class Evidence:
    """What was found out about a study's best trials after its end."""

    winner: int
    """The best trial's number."""
    values: Mapping[int, float]
    """The objective on fresh seeds, by trial."""
    files: tuple[Path, ...]
    """Tables and pictures, in a folder of their own."""


@dataclass(frozen=True)
class StudyView:
    """A study as trackers and displays see it."""

    name: str
    root: Path
    """The study's own folder, `<output>/<name>`."""
    study_yaml: str
    """Text of the study after `extends:` and `--set`."""
    tags: dict[str, str]
    """What made it: git commit, config hash, library versions."""
    num_trials: int
    """Counted trials at which the study is complete."""
    value_names: tuple[str, ...] = ("value",)
    """Names of the objective's values; larger is better in each."""
    evidence: Evidence | None = None
    """Once it is there."""


@dataclass(frozen=True)
class TrialView:
    """A trial as trackers and displays see it."""

    number: int
    state: str
    """Optuna's name of the state: RUNNING, COMPLETE, PRUNED, FAIL or WAITING."""
    params: dict[str, Any]
    """What the sampler chose: dotted path to value."""
    values: list[float] | None
    """Objective values, once known."""
    reason: str | None
    """Why it was pruned, failed, or cannot win."""
    run: RunDir
    start: datetime | None
    """In UTC, as `end`."""
    end: datetime | None
    violations: dict[str, float] = field(default_factory=dict[str, float])
    """Bounds of the objective that a scored trial breaks, and by how much."""


class Tracker(Choice):
    """A store that mirrors a study for people to look at."""

    @abstractmethod
    def mirror(self, study: StudyView, trials: Sequence[TrialView]) -> None:
        """Bring the store up to date with the files.

        Called at every poll and once at the end, with all trials of the study. Calling it again changes nothing, and
        what an earlier call could not deliver is delivered by the next one.

        Raises:
            TrackerError: The store cannot be reached or refused an update.
        """

    @abstractmethod
    def serve(self, name: str, root: Path, port: int, say: Callable[[str], None]) -> None:
        """Show the store in a browser, on this machine only, until interrupted.

        Args:
            name: The study's name.
            root: The study's own folder, as in `StudyView`.
            port: Where to listen; another port is used, and said, if this one is taken. 0 is any free one.
            say: Receives what the user should read, such as the address.

        Raises:
            ConfigError: There is nothing to show.
            TrackerError: The store cannot be opened, or its server does not start.
        """
