"""The reconcile loop against a cluster that kills controllers and loses jobs."""

# pyright: basic

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from orchestrator import controller
from orchestrator.ending import end_jobs
from orchestrator.failures import StudyStoppedError
from orchestrator.launcher import JobId, JobState
from tests.orchestrator.cluster import Cluster, Crash, begin, die, drive, fail_with, spec_of, states
from tests.orchestrator.studies import score
from trainers.rundir import RunDir, thaw

NEEDS_BASE = "objective={kind: constrained, maximise: {clip_i: 1}, subject_to: {clip_t: {below_base: 0.5}}}"
"""The untrained model's job comes first."""


def test_a_study_ends_with_exactly_its_number_of_scored_trials(cluster: Cluster, tmp_path: Path):
    study, _ = drive(spec_of(tmp_path))
    assert states(study) == ["COMPLETE"] * 8
    assert len(cluster.jobs) == 8


def test_the_first_trial_is_the_studys_own_defaults(cluster: Cluster, tmp_path: Path):
    study, _ = drive(spec_of(tmp_path))
    assert study.trials[0].params == {"train.optimizer.lr": 1e-3, "train.lora.rank": 8}


@pytest.mark.parametrize("seed", range(60))
def test_killed_anywhere_it_loses_and_repeats_nothing(cluster: Cluster, tmp_path: Path, seed: int):
    cluster.rng, cluster.crash = random.Random(seed), 0.15
    spec = spec_of(tmp_path, "limits.parallel=3", "sampler={kind: random}", "limits.trials=5")
    study, _ = drive(spec)
    assert states(study) == ["COMPLETE"] * 5
    assert len(cluster.jobs) == 5, "a job was doubled"
    for trial in study.trials:  # what ran is what the sampler believes ran
        frozen = thaw(spec.root / "trials" / f"{trial.number:04d}" / "trial.yaml", trial.user_attrs["sha256"])
        assert frozen["train"]["optimizer"]["lr"] == trial.params["train.optimizer.lr"]
        assert frozen["train"]["lora"]["rank"] == trial.params["train.lora.rank"]


def test_being_killed_does_not_change_what_is_asked(cluster: Cluster, tmp_path: Path):
    def behave(run: RunDir) -> None:
        score(run, clip_t=-abs(thaw(run.trial)["train"]["optimizer"]["lr"] - 3e-3))

    cluster.behaviour = behave
    (tmp_path / "calm").mkdir()
    (tmp_path / "wild").mkdir()
    sets = ("sampler={kind: tpe, startup_trials: 3}", "limits.trials=7")
    calm, _ = drive(spec_of(tmp_path / "calm", *sets))
    cluster.rng, cluster.crash = random.Random(5), 0.2
    wild, crashes = drive(spec_of(tmp_path / "wild", *sets))
    assert crashes > 3
    assert [trial.params for trial in wild.trials] == [trial.params for trial in calm.trials]


@pytest.mark.parametrize("seed", range(10))
def test_a_lost_job_is_submitted_again_into_the_same_directory(cluster: Cluster, tmp_path: Path, seed: int):
    cluster.rng, cluster.lose, cluster.crash = random.Random(seed), 0.2, 0.05
    study, _ = drive(spec_of(tmp_path, "limits.max_retries=3"))
    assert states(study).count("COMPLETE") == 8
    runs = [job["run"].path for job in cluster.jobs.values()]
    assert len(runs) > len(set(runs)), "chance lost no job; choose another seed"
    for trial in study.trials:
        assert (trial.state is TrialState.FAIL) == (len(trial.user_attrs.get("lost", [])) == 4)


def test_a_job_that_is_lost_too_often_fails_its_trial_and_is_not_counted(cluster: Cluster, tmp_path: Path):
    doomed = {"0000", "0001"}
    cluster.behaviour = lambda run: None if run.path.name in doomed else score(run)
    study, _ = drive(spec_of(tmp_path, "limits.max_retries=1", "limits.trials=3"))
    assert states(study) == ["FAIL", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert [trial.user_attrs.get("reason") for trial in study.trials] == ["lost", "lost", None, None, None]
    assert len(cluster.jobs) == 2 * 2 + 3


@pytest.mark.parametrize("reason", ["oom", "nan"])
def test_failures_that_depend_on_parameters_are_counted_and_constrain_the_sampler(
    cluster: Cluster, tmp_path: Path, reason: str
):
    cluster.behaviour = lambda run: score(run) if run.path.name == "0001" else fail_with(reason)(run)
    cluster.rng, cluster.crash = random.Random(0), 0.1
    study, _ = drive(spec_of(tmp_path, "limits.trials=4"))
    assert states(study) == ["PRUNED", "COMPLETE", "PRUNED", "PRUNED"]
    assert [trial.constraints for trial in study.trials] == [{reason: 1.0}, {}, {reason: 1.0}, {reason: 1.0}]
    assert study.best_trial.number == 1


def test_a_failure_of_one_trial_does_not_end_the_study(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = lambda run: fail_with("disk")(run) if run.path.name in {"0001", "0002"} else score(run)
    study, _ = drive(spec_of(tmp_path, "limits.trials=3"))
    assert states(study) == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[1].user_attrs["reason"] == "disk"


def test_the_same_failure_three_times_from_the_start_stops_the_study(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = fail_with("data", "no captions")
    with pytest.raises(StudyStoppedError, match="the first 3 trials that failed, the last with data: no captions"):
        drive(spec_of(tmp_path))
    assert len(cluster.jobs) == 3


def test_different_failures_at_the_start_do_not_stop_the_study(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = lambda run: fail_with("crash", run.path.name)(run) if run.path.name < "0004" else score(run)
    study, _ = drive(spec_of(tmp_path, "limits.trials=1"))
    assert states(study) == ["FAIL"] * 4 + ["COMPLETE"]


def test_a_stopped_study_goes_on_when_its_cause_is_mended(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = fail_with("data")
    with pytest.raises(StudyStoppedError):
        drive(spec_of(tmp_path))
    cluster.behaviour = score
    study, _ = drive(spec_of(tmp_path, "limits.trials=2"))
    assert states(study) == ["FAIL"] * 3 + ["COMPLETE"] * 2


def test_ten_failures_in_a_row_stop_the_study_whatever_they_are(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = lambda run: score(run) if run.path.name == "0000" else fail_with("crash", run.path.name)(run)
    with pytest.raises(StudyStoppedError, match="10 trials in a row"):
        drive(spec_of(tmp_path))


def test_more_trials_extend_a_finished_study(cluster: Cluster, tmp_path: Path):
    drive(spec_of(tmp_path, "limits.trials=2"))
    study, _ = drive(spec_of(tmp_path, "limits.trials=5"))
    assert states(study) == ["COMPLETE"] * 5
    study, _ = drive(spec_of(tmp_path, "limits.trials=3"))
    assert states(study) == ["COMPLETE"] * 5
    assert len(cluster.jobs) == 5


def test_an_interrupted_controller_ends_its_jobs_and_the_trials_go_on_later(cluster: Cluster, tmp_path: Path):
    def interrupt(run: RunDir) -> None:
        raise KeyboardInterrupt

    cluster.behaviour = interrupt
    with pytest.raises(KeyboardInterrupt):
        drive(spec_of(tmp_path, "limits.parallel=2"))
    assert sorted(cluster.cancelled) == ["0", "1"]
    cluster.behaviour = score
    study, _ = drive(spec_of(tmp_path, "limits.trials=3", "limits.max_retries=0"))
    assert states(study) == ["COMPLETE"] * 3
    assert all("lost" not in trial.user_attrs for trial in study.trials)


def test_an_interrupt_before_a_jobs_id_is_noted_ends_that_job_too(cluster: Cluster, tmp_path: Path):
    def interrupt_once() -> None:
        if cluster.jobs and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    interrupted: list[bool] = []
    cluster.maybe_crash = interrupt_once
    with pytest.raises(KeyboardInterrupt):
        drive(spec_of(tmp_path))
    assert cluster.cancelled == ["0"]


@pytest.mark.parametrize("sets", [[], [NEEDS_BASE]])
def test_a_place_is_free_when_the_job_is_gone_and_not_when_it_has_its_scores(
    cluster: Cluster, tmp_path: Path, sets: list[str]
):
    class Alone(dict[JobId, dict[str, Any]]):
        def __setitem__(self, job_id: JobId, job: dict[str, Any]) -> None:
            assert all(other["state"] is JobState.ENDED for other in self.values())
            super().__setitem__(job_id, job)

    def progress() -> None:
        for job in cluster.jobs.values():
            job["polls"] += 1
            if job["polls"] == 3:
                score(job["run"])
            elif job["polls"] == 6:
                job["state"] = JobState.ENDED

    cluster.jobs, cluster.progress = Alone(), progress
    study, _ = drive(spec_of(tmp_path, "limits.trials=3", *sets))
    assert states(study) == ["COMPLETE"] * 3
    assert not cluster.cancelled


def test_a_job_that_has_its_scores_and_does_not_end_is_ended(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("orchestrator.ending._LINGER_SECONDS", 0.01)
    cluster.progress = lambda: score(list(cluster.jobs.values())[-1]["run"])
    study, _ = drive(spec_of(tmp_path, "limits.trials=2"))
    assert states(study) == ["COMPLETE"] * 2
    assert cluster.cancelled == ["0", "1"]


def test_a_job_that_takes_too_long_is_ended_and_counts_as_lost(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = lambda run: None
    sets = ("launcher.timeout_minutes=1e-9", "limits.max_retries=0", "limits.trials=1")
    with pytest.raises(StudyStoppedError, match="lost: the job took longer than 1e-09 minutes, 1 times"):
        drive(spec_of(tmp_path, *sets))
    assert cluster.cancelled == ["0", "1", "2"]


def test_time_in_a_cluster_s_queue_does_not_count(cluster: Cluster, tmp_path: Path):
    cluster.first_state = JobState.QUEUED
    sets = ("launcher.timeout_minutes=1e-9", "limits.max_retries=0", "limits.trials=1")
    study, _ = drive(spec_of(tmp_path, *sets))
    assert states(study) == ["COMPLETE"]


def test_a_job_s_time_begins_when_it_leaves_the_queue(cluster: Cluster, tmp_path: Path):
    class Leaving(dict[JobId, dict[str, Any]]):
        def __setitem__(self, job_id: JobId, job: dict[str, Any]) -> None:
            super().__setitem__(job_id, job)
            job["states"] = iter([JobState.QUEUED, JobState.RUNNING])

    def progress() -> None:
        for job in cluster.jobs.values():
            if job["state"] is not JobState.ENDED:
                job["state"] = next(job["states"], JobState.RUNNING)

    cluster.jobs, cluster.progress = Leaving(), progress
    sets = ("launcher.timeout_minutes=1e-9", "limits.max_retries=0", "limits.trials=1")
    with pytest.raises(StudyStoppedError, match="took longer"):
        drive(spec_of(tmp_path, *sets))


def test_a_result_that_cannot_be_read_fails_its_trial(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = lambda run: run.result.write_text("{}") if run.path.name == "0001" else score(run)
    study, _ = drive(spec_of(tmp_path, "limits.trials=2"))
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "does not hold the scores" in study.trials[1].user_attrs["message"]


def test_an_undefined_value_is_pruned_as_nan(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = lambda run: score(run, clip_t=float("nan"))
    study, _ = drive(spec_of(tmp_path, "limits.trials=2"))
    assert [(trial.state.name, trial.user_attrs["reason"]) for trial in study.trials] == [("PRUNED", "nan")] * 2


def test_a_study_goes_on_while_its_tracker_is_down_and_says_so_once(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    study, _ = drive(spec_of(tmp_path, "tracker={kind: broken}", "limits.trials=3"))
    assert states(study) == ["COMPLETE"] * 3
    assert sum("the store is down" in record.getMessage() for record in caplog.records) == 1


def test_a_grid_ends_when_every_point_was_tried_once(cluster: Cluster, tmp_path: Path):
    sets = (
        "search.train.optimizer.lr={kind: categorical, choices: [1e-4, 1e-3]}",
        "sampler={kind: grid}",
        "limits.trials=100",
    )
    cluster.behaviour = lambda run: fail_with("crash", run.path.name)(run) if run.path.name == "0001" else score(run)
    study, _ = drive(spec_of(tmp_path, *sets))
    assert sorted(states(study)) == ["COMPLETE"] * 6 + ["FAIL"]
    points = {tuple(trial.params.values()) for trial in study.trials if trial.state is TrialState.COMPLETE}
    assert points == set(itertools.product([1e-4, 1e-3], [4, 8, 16]))


def test_a_frozen_trial_that_was_edited_is_not_run(cluster: Cluster, tmp_path: Path):
    spec = spec_of(tmp_path, "limits.trials=1")
    run = RunDir(spec.root / "trials" / "0000")
    run.path.mkdir(parents=True)
    run.trial.write_text("sha256: 0\nseed: 1\n")
    study, _ = drive(spec)
    assert states(study) == ["FAIL", "COMPLETE"]
    assert "must not be edited" in study.trials[0].user_attrs["message"]


def test_jobs_wait_for_a_device_and_none_is_given_twice(cluster: Cluster, tmp_path: Path):
    cluster.num_devices = 2
    cluster.rng, cluster.crash, cluster.lose = random.Random(6), 0.05, 0.1
    study, crashes = drive(spec_of(tmp_path, "limits.parallel=4", "limits.max_retries=9", "sampler={kind: random}"))
    assert crashes
    assert states(study) == ["COMPLETE"] * 8
    assert {job["job"].devices for job in cluster.jobs.values()} == {(0,), (1,)}


def test_killed_while_it_ends_its_jobs_a_controller_has_lost_none(cluster: Cluster, tmp_path: Path):
    spec = spec_of(tmp_path, "limits.trials=1", "limits.max_retries=0")
    doomed = begin(spec)
    doomed.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controller, "end_jobs", lambda launcher, ids: (end_jobs(launcher, ids), die()))
        with pytest.raises(Crash):
            doomed.stop()
    study, _ = drive(spec)
    assert states(study) == ["COMPLETE"]


def test_a_job_that_is_put_back_into_the_queue_has_worked_for_all_its_pieces(cluster: Cluster, tmp_path: Path):
    cluster.progress = lambda: None
    running = begin(spec_of(tmp_path, "limits.trials=1", "launcher.timeout_minutes=600"))
    moments = itertools.count(0, 4 * 3600)
    running._meter.clock = lambda: next(moments)
    running.step()
    for state in (JobState.RUNNING, JobState.QUEUED, JobState.RUNNING, JobState.QUEUED, JobState.RUNNING):
        cluster.jobs[JobId("0")]["state"] = state
        running.step()
        assert not cluster.cancelled
    running.step()
    assert cluster.cancelled == ["0"]
    assert running._meter.usage.device_seconds == 12 * 3600
