"""The untrained model, scored once in a study on the trial's own panel: what `below_base` bounds speak of."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.ending import Leaving
from orchestrator.launcher import Job, JobId, JobState
from trainers.errors import LaunchError
from trainers.rundir import RunDir, Score, freeze, write_atomically

if TYPE_CHECKING:
    from orchestrator.budget import Meter
    from orchestrator.spec import StudySpec

log = logging.getLogger(__name__)


@dataclass
class Base:
    """A job like any other, in `<root>/base`. What is remembered here only saves work: a new one finds the job."""

    spec: StudySpec
    module: str
    """What the job runs."""
    meter: Meter
    """Counts its time."""
    _job_id: JobId | None = field(default=None, init=False)
    _num_lost: int = field(default=0, init=False)
    _leaving: Leaving = field(init=False)

    def __post_init__(self) -> None:
        self._leaving = Leaving(self.spec.launcher)

    @property
    def run(self) -> RunDir:
        """Where the job writes."""
        return RunDir(self.spec.root / "base")

    @property
    def job_ids(self) -> tuple[JobId, ...]:
        """Of the job that is known to live, if there is one."""
        return (self._job_id,) if self._job_id else ()

    def scores(self) -> dict[str, Score] | None:
        """What was measured; None if it was not yet, and nothing if no bound asks for it."""
        if not self.spec.objective.needs_base:
            return {}
        result = self.run.read_result()
        return result.scores if result else None

    def is_done(self) -> bool:
        """Whether trials can start: what they need was measured, and the job's place is free. Raises LaunchError."""
        if self.scores() is None:
            return False
        if self._job_id is not None and not self._leaving.is_gone(self._job_id, self.spec.launcher.poll(self._job_id)):
            return False
        self._job_id = None
        return True

    def advance(self) -> None:
        """Start the job, or look after it. Raises LaunchError if it failed, or was lost too often."""
        launcher = self.spec.launcher
        if self._job_id is None:
            self._job_id = launcher.find(self._job()) or self._submit()
            if self._job_id is None:
                return
            log.info("the untrained model is scored first, because a bound of the objective speaks of it")
        state = launcher.poll(self._job_id)
        self.meter.saw(self._job_id, state, self.run.events)
        is_late = state is JobState.RUNNING and self.meter.at_work(self._job_id) > launcher.timeout_minutes * 60
        if self.run.result.exists():
            return
        if error := self.run.read_error():
            self.stop()
            raise LaunchError(f"{self.run.path}: got {error.reason}: {error.message}; expected the base's scores")
        if state is JobState.ENDED or is_late:
            self.stop()
            self._num_lost += 1
            if self._num_lost > self.spec.limits.max_retries:
                raise LaunchError(f"{self.run.path}: got no scores of the base; expected some; see {self.run.log}")

    def stop(self) -> None:
        """End the job, if there is one; it begins anew when the study is run again."""
        job_id = self._job_id or (self.spec.launcher.find(self._job()) if self.run.trial.exists() else None)
        self._job_id = None
        if job_id:
            self.spec.launcher.cancel(job_id)

    def _submit(self) -> JobId | None:
        """None while no device is free."""
        self.run.error.unlink(missing_ok=True)  # its cause may have been mended
        write_atomically(self.run.trial, self._frozen()[0])
        return self.spec.launcher.begin(self._job())

    def _job(self) -> Job:
        arguments = ("--sha256", self._frozen()[1], "--cache", str(self.spec.cache), "--untrained")
        return Job(self.module, (str(self.run.path), *arguments), self.run.path)

    def _frozen(self) -> tuple[str, str]:
        return freeze(self.spec.trial.model_dump(mode="json"))
