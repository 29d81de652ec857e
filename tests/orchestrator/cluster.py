"""A cluster in memory that kills controllers and loses jobs, and a way to run a study on it to its end."""

# pyright: basic

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import optuna

from orchestrator.controller import Controller
from orchestrator.launcher import Job, JobId, JobState, Launcher
from orchestrator.pruners import Curve, Pruner
from orchestrator.spec import StudySpec
from orchestrator.tracker import Tracker
from tests.orchestrator.studies import load, score
from trainers.errors import TrackerError
from trainers.rundir import RunDir, RunError

Behaviour = Callable[[RunDir], object]


class Crash(BaseException):
    """The controller is killed."""


class Cluster:
    """Survives controllers. Each job works over three polls; the rest is chance and `behaviour`."""

    def __init__(self) -> None:
        self.rng = random.Random(0)
        self.crash = self.lose = 0.0
        self.behaviour: Behaviour = score
        self.first_state = JobState.RUNNING
        self.jobs: dict[JobId, dict[str, Any]] = {}
        self.cancelled: list[JobId] = []
        self.num_devices: int | None = None

    def maybe_crash(self) -> None:
        if self.rng.random() < self.crash:
            raise Crash

    def progress(self) -> None:
        for job in self.jobs.values():
            if job["state"] is JobState.ENDED:
                continue
            job["polls"] += 1
            if self.rng.random() < self.lose:
                job["state"] = JobState.ENDED
            elif job["polls"] >= 3:
                self.behaviour(job["run"])
                job["state"] = JobState.ENDED


@contextmanager
def registered_cluster() -> Iterator[Cluster]:  # noqa: C901  three small classes, which see the cluster
    """Launcher, tracker and pruner kinds for one test."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    the_cluster = Cluster()

    class FakeLauncher(Launcher):
        kind: Literal["fake"] = "fake"

        def check(self) -> None: ...

        def free_devices(self) -> tuple[int, ...] | None:
            if the_cluster.num_devices is None:
                return ()
            live = [known["job"] for known in the_cluster.jobs.values() if known["state"] is JobState.RUNNING]
            free = set(range(the_cluster.num_devices)) - {device for job in live for device in job.devices}
            return (min(free),) if free else None

        def submit(self, job: Job) -> JobId:
            the_cluster.maybe_crash()
            live = [known["job"] for known in the_cluster.jobs.values() if known["state"] is JobState.RUNNING]
            assert not any(set(job.devices) & set(other.devices) for other in live), "a device has two jobs"
            job_id = JobId(str(len(the_cluster.jobs)))
            the_cluster.jobs[job_id] = {
                "run": RunDir(job.run_dir),
                "polls": 0,
                "state": the_cluster.first_state,
                "job": job,
            }
            the_cluster.maybe_crash()  # submitted, but the controller never learnt it
            return job_id

        def find(self, job: Job) -> JobId | None:
            the_cluster.maybe_crash()
            for job_id, known in the_cluster.jobs.items():
                if known["job"].token == job.token and known["state"] is not JobState.ENDED:
                    return job_id
            return None

        def poll(self, job_id: JobId) -> JobState:
            the_cluster.maybe_crash()
            the_cluster.progress()
            return the_cluster.jobs[job_id]["state"]

        def cancel(self, job_id: JobId) -> None:
            the_cluster.maybe_crash()
            the_cluster.cancelled.append(job_id)
            the_cluster.jobs[job_id]["state"] = JobState.ENDED

    class BrokenTracker(Tracker):
        kind: Literal["broken"] = "broken"
        calls: ClassVar[list[int]] = []

        def mirror(self, study, trials) -> None:
            self.calls.append(len(trials))
            raise TrackerError("the store is down")

        def serve(self, name, root, port, say) -> None: ...

    class Threshold(Pruner):
        kind: Literal["threshold"] = "threshold"

        def prunes(self, own: Curve, others: Sequence[Curve]) -> bool:
            return own.reports[own.last] < 0.3

    yield the_cluster
    for family, kind in ((Launcher, "fake"), (Tracker, "broken"), (Pruner, "threshold")):
        family._kinds.pop(kind)


def spec_of(folder: Path, *sets: str) -> StudySpec:
    return load(folder, "launcher={kind: fake, poll_seconds: 1e-6}", *sets)


STORAGES: dict[Path, optuna.storages.InMemoryStorage] = {}


def open_in_memory(spec: StudySpec) -> optuna.Study:
    """The study, in a storage that outlives controllers and not the process."""
    return optuna.create_study(
        storage=STORAGES.setdefault(spec.root, optuna.storages.InMemoryStorage()),
        study_name=spec.name,
        directions=[optuna.study.StudyDirection.MAXIMIZE] * len(spec.objective.names),
        load_if_exists=True,
    )


def drive(spec: StudySpec) -> tuple[optuna.Study, int]:
    """Run the study to its end, starting the controller again whenever it is killed.

    The storage is in memory: SQLite's part is tested with real processes in tests/integration.
    """
    for crashes in itertools.count():
        study = open_in_memory(spec)
        try:
            Controller(spec, study).run()
        except Crash:
            continue
        return study, crashes
    raise AssertionError


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


def fail_with(reason: Any, message: str = "why") -> Behaviour:
    return lambda run: run.write(run.error, RunError(reason=reason, message=message))


def begin(spec: StudySpec) -> Controller:
    """A controller of the study that the test moves step by step."""
    return Controller(spec, open_in_memory(spec))


def die(*_: object) -> None:
    """Put in place of what a controller was about to do."""
    raise Crash
