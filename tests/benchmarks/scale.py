"""Ten thousand trials, 256 at a time: the real controller, the real database, and jobs that end at their third poll.

    python -m tests.benchmarks.scale [--database postgresql] [--trials 1000 10000]
    python -m tests.benchmarks.scale --trials 200 --grow 50 --more 400

The last one copies 200 trials to 10,000 in both databases, measures the resume, and then what 400 more take of both,
without the opening: in minutes, what the end of a run of 10,000 is like.

Beside it plain Optuna asks and tells as often, with the same sampler, parameters and database, and nothing else. The
ratio is what the controller costs: frozen files, attributes, polls, results. Then the study is opened again and goes
one step on: that is what a resume costs. Jobs and tracker cost nothing here.
"""

import argparse
import gc
import os
import platform
import resource
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import optuna
import psutil
from typing_extensions import override

from orchestrator.controller import Controller
from orchestrator.database import open_database
from orchestrator.launcher import Job, JobId, JobState, Launcher
from orchestrator.spec import StudySpec
from orchestrator.storage import open_study, open_tables
from orchestrator.tracker import FINAL_STATES, StudyView, TrialView
from tests.contracts.storage import close
from tests.orchestrator.postgresql import running_server
from tests.orchestrator.studies import load, score
from trainers.rundir import RunDir

PARALLEL = 256
MARK = 1000
"""Trials after which a run says what they cost."""


@dataclass(frozen=True)
class Cost:
    """Of some work."""

    seconds: float
    """By the clock on the wall."""
    cpu: float
    """Seconds of this process on a core; a database server's are not among them."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.cpu + other.cpu)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds - other.seconds, self.cpu - other.cpu)

    def per(self, trials: int) -> str:
        """Milliseconds of each trial: on a core, and (on the wall)."""
        return f"{1000 * self.cpu / trials:.1f} ({1000 * self.seconds / trials:.1f})"


NOTHING = Cost(0.0, 0.0)


def now() -> Cost:
    return Cost(time.perf_counter(), time.process_time())


def megabytes() -> float:
    """Of this process, without what nothing holds any more."""
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


@dataclass
class Progress:
    """Says on stderr what every thousand trials cost: whether later ones cost more, and enough if a run is stopped."""

    what: str
    _trials: int = 0
    _begin: Cost = field(default_factory=now)

    def see(self, trials: int, apart: Cost = NOTHING) -> None:
        """So many have ended; `apart` is what the clock holds of other work."""
        if trials - self._trials >= MARK:
            passed, count = now() - apart - self._begin, trials - self._trials
            print(f"{self.what}: {trials} trials, {passed.per(count)} ms, {megabytes():.0f} MiB", file=sys.stderr)
            self._trials, self._begin = trials, now() - apart


def cost(work: Callable[[], object]) -> Cost:
    begin = now()
    work()
    return now() - begin


class SimulatedLauncher(Launcher):
    """Jobs live in this process and end at their third poll."""

    kind: Literal["simulated"] = "simulated"
    polls: ClassVar[dict[JobId, int]] = {}
    spent: ClassVar[list[Cost]] = [NOTHING]
    """On writing results, which jobs do elsewhere: after each job, for all so far."""

    @override
    def check(self) -> None: ...

    @override
    def submit(self, job: Job) -> JobId:
        job_id = JobId(str(job.run_dir))
        self.polls[job_id] = 0
        return job_id

    @override
    def find(self, job: Job) -> JobId | None:
        job_id = JobId(str(job.run_dir))
        return job_id if job_id in self.polls else None

    @override
    def poll(self, job_id: JobId) -> JobState:
        if job_id not in self.polls:
            return JobState.ENDED
        self.polls[job_id] += 1
        if self.polls[job_id] < 3:
            return JobState.RUNNING
        del self.polls[job_id]
        self.spent.append(self.spent[-1] + cost(lambda: score(RunDir(Path(job_id)), clip_t=0.25)))
        return JobState.ENDED

    @override
    def cancel(self, job_id: JobId) -> None:
        self.polls.pop(job_id, None)


@dataclass(frozen=True)
class Measured:
    """One size on one database."""

    trials: int
    """That both ran."""
    size: int
    """Trials of the study in the end."""
    plain: Cost
    controller: Cost
    resume: Cost
    megabytes_before: float
    megabytes_after: float


def study_of(folder: Path, url: str | None, trials: int) -> StudySpec:
    """A study whose jobs are simulated and whose sampler is random, as the comparison's."""
    sets = [
        "launcher={kind: simulated, poll_seconds: 1e-6}",
        "sampler={kind: random}",
        f"limits={{trials: {trials}, parallel: {PARALLEL}}}",
    ]
    return load(folder, *sets, *([f"storage={url}"] if url else []))


def run_plainly(spec: StudySpec, url: str, trials: int) -> None:
    """Ask and tell, 256 at a time."""
    storage = open_tables(open_database(url))
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(
        study_name="plain", storage=storage, sampler=sampler, direction="maximize", load_if_exists=True
    )
    running: list[optuna.Trial] = []
    progress = Progress("ask and tell")
    for number in range(trials):
        progress.see(number - len(running))
        trial = study.ask()
        for name, parameter in spec.search.items():
            parameter.suggest(trial, name)
        running.append(trial)
        if len(running) == PARALLEL:
            study.tell(running.pop(0), 0.25)
    for trial in running:
        study.tell(trial, 0.25)
    storage.remove_session()
    storage.engine.dispose()


def run_controlled(spec: StudySpec) -> Cost:
    """The whole study, without what the jobs did."""
    SimulatedLauncher.spent[:] = [NOTHING]
    progress = Progress("controller")

    def look(_: StudyView, trials: Sequence[TrialView]) -> None:
        progress.see(sum(trial.state in FINAL_STATES for trial in trials), SimulatedLauncher.spent[-1])

    begin = now()
    study = open_study(spec)
    Controller(spec, study, observers=[look]).run()
    found = now() - begin - SimulatedLauncher.spent[-1]
    states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
    assert states == ["COMPLETE"] * spec.limits.trials, set(states)
    close(study)
    return found


def resume(spec: StudySpec) -> None:
    """Open the finished study for one trial more, and take the first step."""
    longer = spec.model_copy(update={"limits": spec.limits.model_copy(update={"trials": spec.limits.trials + 1})})
    study = open_study(longer)
    Controller(longer, study).step()
    close(study)


def grow(file: Path, times: int) -> None:
    """Copy every trial of an SQLite study so often, with all that hangs on it, under new numbers."""
    links = {
        "trial_params": "trial_id, param_name, param_value, distribution_json",
        "trial_values": "trial_id, objective, value, value_type",
        "trial_user_attributes": "trial_id, key, value_json",
        "trial_system_attributes": "trial_id, key, value_json",
    }
    with closing(sqlite3.connect(file)) as database, database:
        (count,) = database.execute("SELECT COUNT(*) FROM trials").fetchone()
        for copy in range(1, times):
            move = copy * count
            database.execute(
                "INSERT INTO trials (trial_id, number, study_id, state, datetime_start, datetime_complete) SELECT "
                "trial_id + ?, number + ?, study_id, state, datetime_start, datetime_complete FROM trials "
                "WHERE trial_id <= ?",
                (move, move, count),
            )
            for table, columns in links.items():
                moved = columns.replace("trial_id", "trial_id + ?")
                text = f"INSERT INTO {table} ({columns}) SELECT {moved} FROM {table} WHERE trial_id <= ?"
                database.execute(text, (move, count))


def plain_url(folder: Path) -> str:
    return f"sqlite:///{folder}/plain.db"


def measure(trials: int, new_url: Callable[[], str] | None) -> Measured:
    """Both, one after the other, in a database of their own, and the resume."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = study_of(folder, new_url() if new_url else None, trials)
        plain = cost(lambda: run_plainly(spec, new_url() if new_url else plain_url(folder), trials))
        before = megabytes()
        controller = run_controlled(spec)
        after = megabytes()
        return Measured(trials, trials, plain, controller, cost(lambda: resume(spec)), before, after)


def measure_grown(trials: int, times: int, more: int) -> Measured:
    """A study that was grown, resumed, and then run on by both: their costs are those of `more` trials."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec, url = study_of(folder, None, trials), plain_url(folder)
        run_plainly(spec, url, trials)
        run_controlled(spec)
        grow(folder / "plain.db", times)
        grow(spec.root / "study.db", times)
        grown = study_of(folder, None, trials * times)
        resumed = cost(lambda: resume(grown))
        opening = cost(lambda: run_plainly(grown, url, 1))
        plain = cost(lambda: run_plainly(grown, url, more)) - opening
        before = megabytes()
        opening = run_controlled(study_of(folder, None, trials * times + 1))
        size = trials * times + 1 + more
        controller = run_controlled(study_of(folder, None, size)) - opening
        return Measured(more, size, plain, controller, resumed, before, megabytes())


@contextmanager
def databases(kind: str) -> Generator[Callable[[], str] | None]:
    """Makes URLs of new databases; None is a file in the study's folder."""
    with ExitStack() as stack:
        yield stack.enter_context(running_server()).new_database if kind == "postgresql" else None


def row(kind: str, found: Measured) -> str:
    ratio = found.controller.cpu / found.plain.cpu
    wall = found.controller.seconds / found.plain.seconds
    grown = 1024 * (found.megabytes_after - found.megabytes_before) / found.size
    return (
        f"| {kind} | {found.trials} | {found.plain.per(found.trials)} | {found.controller.per(found.trials)} | "
        f"{ratio:.2f} ({wall:.2f}) | {found.resume.cpu:.1f} ({found.resume.seconds:.1f}) | "
        f"{found.megabytes_after:.0f} | {grown:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--trials", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--grow", type=int, default=1, help="go on with a study so many times as large (SQLite)")
    parser.add_argument("--more", type=int, default=2 * PARALLEL, help="by so many trials")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with databases(options.database) as new_url:
        for trials in options.trials:
            grown = options.grow > 1
            found = measure_grown(trials, options.grow, options.more) if grown else measure(trials, new_url)
            print(row(options.database, found), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"peak {peak} MiB; load {os.getloadavg()[0]:.1f}; optuna {optuna.__version__}; {platform.python_version()}")


if __name__ == "__main__":
    main()
