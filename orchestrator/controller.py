"""The reconcile loop. All state is in Optuna's storage and in the run directories."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from orchestrator.base import Base
from orchestrator.beginning import Beginning, remember_beginning, take_results
from orchestrator.budget import Meter, reached
from orchestrator.drawing import DrawingSampler
from orchestrator.ending import Leaving, end_jobs
from orchestrator.failures import StudyStoppedError, check_hope, note_failure
from orchestrator.launcher import Job, JobId, JobState
from orchestrator.panels import PROMPT_VALUES, prompt_values, say_notes
from orchestrator.quota import Quota
from orchestrator.reports import Reports
from orchestrator.search import Value
from orchestrator.signals import pause, undisturbed
from orchestrator.spec import StudySpec
from orchestrator.storage import told
from orchestrator.tracker import FINAL_STATES, StudyView, TrialView
from orchestrator.views import run_dir, study_view, trial_view
from trainers.errors import ConfigError, StorageError, TrackerError
from trainers.rundir import RunDir, RunError, freeze, recorded_hash, thaw, write_atomically

log = logging.getLogger(__name__)

Observer = Callable[[StudyView, Sequence[TrialView]], None]

WORKER = "orchestrator.worker"
_COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
_LEARNABLE = {"oom", "nan"}
"""Failures that depend on the parameters: the sampler is told, and they count."""


@dataclass
class Controller:
    """Runs a study to its end. Kill it and start it again: no trial is lost or told twice."""

    spec: StudySpec
    study: optuna.Study
    observers: Sequence[Observer] = ()
    """Told about the study after every step, after the tracker."""
    _tracker_is_down: bool = field(default=False, init=False)
    _failures_before: frozenset[int] = field(default=frozenset(), init=False)
    _ended: dict[int, TrialView] = field(default_factory=dict[int, TrialView], init=False)
    _attached: dict[int, Trial] = field(default_factory=dict[int, Trial], init=False)
    _reports: Reports = field(init=False)
    _base: Base = field(init=False)
    _beginning: Beginning = field(init=False)
    _meter: Meter = field(init=False)
    _quota: Quota = field(init=False)
    _over: str | None = field(default=None, init=False)
    _leaving: Leaving = field(init=False)

    def __post_init__(self) -> None:
        self._leaving = Leaving(self.spec.launcher)
        self._meter = Meter(self.spec.root, self.spec.launcher.num_ranks)
        self._quota = Quota(self.spec.limits)
        self._base = Base(self.spec, WORKER, self._meter)
        self._reports = Reports(self.spec, self.study)
        self._beginning = remember_beginning(self.spec, self.study)
        first = [trial.params for trial in self._beginning.trials]
        self.study.sampler = DrawingSampler(self.spec.sampler, self.spec.search, first)

    def run(self) -> None:
        """Ask, submit, poll and tell until the study has all its trials.

        Raises:
            StudyStoppedError: The first trials, or many in a row, failed.
            LaunchError: A job cannot be started.
            StorageError: The study's file, or a run directory, cannot be written.
            KeyboardInterrupt: The user wants to stop; the jobs are ended and their trials can go on later.
        """
        self._failures_before = frozenset(t.number for t in self._trials(TrialState.FAIL))
        view = study_view(self.spec, self.study)
        with told(self.spec.root):
            if not self.spec.launcher.outlives_controller:
                self.stop()  # jobs of a killed controller, which are ending: they are not lost
            try:
                while not self.step():
                    self._observe(view)
                    pause(self.spec.launcher.poll_seconds)
                self._observe(view)
                self._meter.save()
            except (KeyboardInterrupt, StudyStoppedError):
                with undisturbed():
                    self.stop()
                self._observe(view)
                self._meter.save()
                raise

    def step(self) -> bool:
        """Move every running trial forward and start new ones; True when there is nothing left."""
        running = self._trials(TrialState.RUNNING)
        jobs = [job_id for frozen in running if (job_id := frozen.user_attrs.get("job_id"))]
        self._meter.tick([*self._base.job_ids, *jobs])
        if not self._base.is_done():
            self._base.advance()
            return False
        self._attached = {frozen.number: self._attach(frozen) for frozen in running}
        for frozen in running:
            if "sha256" in frozen.user_attrs:
                self._advance(frozen)
            else:  # we stopped between ask and submit
                self._start(self._attach(frozen))
        self._stop_if_hopeless()
        said = self.spec.sampler.notes(self.spec.search, self.study)
        say_notes(self.study, self.spec.root, [*self._beginning.notes, *said])
        trials = self._views() if self.spec.limits.judge_results else []
        self._quota.enforce(trials)
        while (room := self._room()) and not self._is_over(trials):
            self._fill(room)
        return not self._trials(TrialState.RUNNING)

    def stop(self) -> None:
        """End all jobs; running trials go on from their checkpoints when the study is run again."""
        self._base.stop()
        live = [(frozen, job) for frozen in self._trials(TrialState.RUNNING) if (job := self._live_job(frozen))]
        for frozen, _ in live:
            self._attach(frozen).set_user_attr("job_id", "")  # ended by us: not lost
        end_jobs(self.spec.launcher, [job for _, job in live])
        for frozen, _ in live:
            log.info("trial %d: its job is ended; it goes on when the study is run again", frozen.number)

    def _live_job(self, frozen: FrozenTrial) -> JobId | None:
        """The trial's job, also one that was submitted when we were interrupted before its id could be noted."""
        if known := frozen.user_attrs.get("job_id"):
            return JobId(known)
        if "sha256" not in frozen.user_attrs:
            return None
        return self.spec.launcher.find(self._job(run_dir(self.spec.root, frozen.number), frozen.user_attrs["sha256"]))

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _attach(self, frozen: FrozenTrial) -> Trial:
        """What a running trial is written by; kept, because Optuna draws anew whenever it makes one."""
        if frozen.number not in self._attached:
            self._attached[frozen.number] = Trial(self.study, frozen._trial_id)  # pyright: ignore[reportPrivateUsage]  # noqa: SLF001
        return self._attached[frozen.number]

    def _room(self) -> int:
        """How many trials can be started now."""
        states = Counter(trial.state for trial in self._trials())
        counted = sum(states[state] for state in _COUNTED)
        # The first trial trains for all that share a training; others would hold a device and wait.
        parallel = 1 if self.spec.shares_training and not counted else self.spec.limits.parallel
        room = min(self.spec.num_trials - counted, parallel) - states[TrialState.RUNNING]
        if room <= 0 or self.spec.launcher.free_devices() is None:
            return 0
        wanted = self.spec.sampler.room(self.spec.search, self.study)
        return room if wanted is None else min(room, wanted)

    def _fill(self, room: int) -> None:
        """Start trials until there is no room or no device, or one fails at once."""
        while room > 0 and self.spec.launcher.free_devices() is not None:
            room -= 1
            trial = self.study.ask()
            self._attached[trial.number] = trial
            if not self._start(trial):
                self._stop_if_hopeless()
                return

    def _is_over(self, trials: Sequence[TrialView]) -> bool:
        why = reached(self.spec, trials, self._meter.usage)
        if why and why != self._over:
            log.info("no more trials are started: %s", why)
        self._over = why
        return why is not None

    def _start(self, trial: Trial) -> bool:
        """Draw, freeze and submit; every part is a repetition without effect if it was done before.

        False if the trial failed.
        """
        run = run_dir(self.spec.root, trial.number)
        params = {name: parameter.suggest(trial, name) for name, parameter in self.spec.search.items()}
        try:
            digest = self._freeze(run, params)
        except ConfigError as error:
            self._fail(trial, RunError(reason="config", message=str(error)))
            return False
        take_results(self._beginning, trial.number, run)  # first: a trial with a hash is not started again
        trial.set_user_attr("sha256", digest)
        if not (run.result.exists() or run.error.exists()):
            self._submit(trial, self._job(run, digest))
        return True

    def _freeze(self, run: RunDir, params: Mapping[str, Value]) -> str:
        if run.trial.exists():
            digest = recorded_hash(run.trial)
            thaw(run.trial, digest)
            return digest
        text, digest = freeze(self.spec.resolve(params).model_dump(mode="json"))
        write_atomically(run.trial, text)
        return digest

    def _submit(self, trial: Trial, job: Job) -> None:
        # It may run already, for a controller that was killed before it could note the id.
        job_id = self.spec.launcher.find(job) or self.spec.launcher.begin(job)
        if job_id:  # else there is no device, until the next look
            trial.set_user_attr("job_id", job_id)

    def _job(self, run: RunDir, sha256: str) -> Job:
        cache = self.spec.cache
        shared = ("--trained", str(self.spec.trainings)) if self.spec.shares_training else ()
        return Job(WORKER, (str(run.path), "--sha256", sha256, "--cache", str(cache), *shared), run.path)

    def _advance(self, frozen: FrozenTrial) -> None:
        trial, run = self._attach(frozen), run_dir(self.spec.root, frozen.number)
        job_id, job = JobId(frozen.user_attrs.get("job_id", "")), self._job(run, frozen.user_attrs["sha256"])
        self._reports.read(trial, run)
        state = self._poll(job_id, run)  # first: what it wrote is then complete
        if run.result.exists():
            if self._leaving.is_gone(job_id, state):
                self._score(trial, run)
        elif run.error.exists():
            if state is not JobState.ENDED:
                self.spec.launcher.cancel(job_id)  # other ranks may wait for the one that failed
            self._fail(trial, _why_failed(run))
        elif self._reports.prune(trial):  # also if its job is gone: we may have been killed while we ended it
            self._prune(trial, job_id)
        elif not job_id:
            self._submit(trial, job)
        elif why := self._why_lost(job_id, state):
            self._lose(trial, job, job_id, why)

    def _poll(self, job_id: JobId, run: RunDir) -> JobState:
        if not job_id:
            return JobState.ENDED
        state = self.spec.launcher.poll(job_id)
        self._meter.saw(job_id, state, run.events)
        return state

    def _why_lost(self, job_id: JobId, state: JobState) -> str | None:
        minutes = self.spec.launcher.timeout_minutes
        if state is JobState.ENDED:
            return "the job ended without a result"
        if state is JobState.QUEUED or self._meter.at_work(job_id) <= minutes * 60:
            return None
        self.spec.launcher.cancel(job_id)
        return f"the job took longer than {minutes} minutes"

    def _prune(self, trial: Trial, job_id: JobId) -> None:
        if job_id:
            self.spec.launcher.cancel(job_id)
        self._end(trial, TrialState.PRUNED, "pruned", self._reports.verdict(trial.number))

    def _score(self, trial: Trial, run: RunDir) -> None:
        objective = self.spec.objective
        try:
            result = run.read_result()
            scores = result.scores if result else {}
            values, violations = objective.values(scores), objective.violations(scores, self._base.scores() or {})
        except (StorageError, KeyError) as error:
            self._fail(trial, RunError(reason="crash", message=f"{run.result} does not hold the scores: {error}"))
            return
        if any(map(math.isnan, (*values, *violations.values()))):
            self._fail(trial, RunError(reason="nan", message="a score of the objective is undefined for every sample"))
            return
        trial.set_user_attr(PROMPT_VALUES, prompt_values(self.spec, run))
        for bound, violation in violations.items():
            self._constrain(trial, bound, violation)
        self.study.tell(trial, values)

    def _lose(self, trial: Trial, job: Job, job_id: JobId, why: str) -> None:
        """Submit again, unless that was done often enough; a job is lost once, however often we are killed here."""
        other = self.spec.launcher.find(job)
        if other is not None:
            trial.set_user_attr("job_id", other)
            return
        lost = [*(known for known in trial.user_attrs.get("lost", []) if known != job_id), job_id]
        trial.set_user_attr("lost", lost)
        if len(lost) <= self.spec.limits.max_retries:
            log.warning("trial %d: %s; submitted again (%d lost so far)", trial.number, why, len(lost))
            self._submit(trial, job)
        else:
            note_failure(RunDir(job.run_dir), "lost", f"{why}, {len(lost)} times", len(lost))
            self._end(trial, TrialState.FAIL, "lost", f"{why}, {len(lost)} times")

    def _fail(self, trial: Trial, error: RunError) -> None:
        state = TrialState.PRUNED if error.reason in _LEARNABLE else TrialState.FAIL
        if state is TrialState.PRUNED:
            self._constrain(trial, error.reason, 1.0)
        lost = len(trial.user_attrs.get("lost", []))
        note_failure(run_dir(self.spec.root, trial.number), error.reason, error.message, lost, error.peak_bytes)
        self._end(trial, state, error.reason, error.message)

    def _end(self, trial: Trial, state: TrialState, reason: str, message: str) -> None:
        trial.set_user_attr("reason", reason)
        trial.set_user_attr("message", message)
        self.study.tell(trial, state=state)

    def _constrain(self, trial: Trial, key: str, violation: float) -> None:
        if key not in trial.constraints:  # else a killed controller came this far
            trial.set_constraint(key, violation)

    def _stop_if_hopeless(self) -> None:
        finished = self._trials(*_COUNTED, TrialState.FAIL)
        check_hope(self.spec.root, [trial for trial in finished if trial.number not in self._failures_before])

    def _views(self) -> list[TrialView]:
        """Every trial as others see it; what has ended changes no more."""
        views = [self._ended.get(t.number) or trial_view(self.spec, t) for t in self._trials()]
        self._ended |= {view.number: view for view in views if view.state in FINAL_STATES}
        return views

    def _observe(self, view: StudyView) -> None:
        trials = self._views()
        try:
            self.spec.tracker.mirror(view, trials)
        except TrackerError as error:
            if not self._tracker_is_down:
                log.warning("%s; the study goes on, and the tracker catches up later", error)
            self._tracker_is_down = True
        else:
            self._tracker_is_down = False
        for observer in self.observers:
            observer(view, trials)


def _why_failed(run: RunDir) -> RunError:
    try:
        error = run.read_error()
    except StorageError as damaged:
        error = RunError(reason="crash", message=f"{damaged}; see {run.log}")
    return error or RunError(reason="crash", message=f"{run.error} is gone; see {run.log}")
