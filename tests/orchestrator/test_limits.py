"""When studies end, what they may use, and that a resume changes neither."""

# pyright: basic

import itertools
import os
import random
from pathlib import Path

import pytest

from orchestrator.budget import Meter, Usage, reached, read_usage, usage_file
from orchestrator.launcher import JobState
from orchestrator.limits import Limits
from orchestrator.plan import estimate, estimate_rest
from orchestrator.quota import Quota
from orchestrator.tracker import TrialView
from tests.orchestrator.cluster import Cluster, drive, fail_with, spec_of, states
from tests.orchestrator.studies import build_world, load, score
from trainers.errors import ConfigError
from trainers.rundir import RunDir, RunResult, write_atomically

MEBIBYTE = 2**20


def by_number(*values: float):
    return lambda run: score(run, clip_t=values[int(run.path.name)])


def test_a_good_enough_value_ends_a_study_and_a_resume_starts_nothing(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = by_number(0.1, 0.2, 0.3, 0.4)
    spec = spec_of(tmp_path, "limits.target=0.3")
    study, _ = drive(spec)
    assert [trial.value for trial in study.trials] == [0.1, 0.2, 0.3]
    study, _ = drive(spec)
    assert len(study.trials) == 3
    study, _ = drive(spec_of(tmp_path, "limits.target=0.35"))
    assert [trial.value for trial in study.trials] == [0.1, 0.2, 0.3, 0.4]


def test_patience_counts_trials_since_the_last_better_one(cluster: Cluster, tmp_path: Path):
    def behave(run: RunDir) -> None:
        if run.path.name == "0002":
            fail_with("oom")(run)  # counts
        elif run.path.name == "0003":
            fail_with("crash")(run)  # does not
        else:
            by_number(0.1, 0.5, 0.0, 0.0, 0.5, 0.4)(run)

    cluster.behaviour = behave
    cluster.rng, cluster.crash = random.Random(0), 0.1
    study, _ = drive(spec_of(tmp_path, "limits.patience=3"))
    assert states(study) == ["COMPLETE", "COMPLETE", "PRUNED", "FAIL", "COMPLETE", "COMPLETE"]


def view(number: int, values: list[float] | None, state: str = "COMPLETE", folder: Path = Path("gone")) -> TrialView:
    return TrialView(number, state, {}, values, None, RunDir(folder / f"{number:04d}"), None, None)


def test_patience_with_several_values_waits_for_the_front(tmp_path: Path):
    spec = load(
        tmp_path,
        "objective={kind: pareto, objectives: {a: {clip_t: 1}, b: {clip_i: 1}}}",
        "limits.patience=2",
    )
    points = [[0.5, 0.5], [0.4, 0.6], [0.4, 0.5], [0.6, 0.1], [0.5, 0.5], [0.1, 0.1]]
    trials = [view(number, point) for number, point in enumerate(points)]
    answers = [reached(spec, trials[:count], Usage()) for count in range(1, 7)]
    assert [bool(answer) for answer in answers] == [False, False, False, False, False, True]
    with pytest.raises(ConfigError, match=r"limits\.target: got a target with an objective of several values"):
        load(tmp_path, "objective={kind: pareto, objectives: {a: {clip_t: 1}, b: {clip_i: 1}}}", "limits.target=1")


def test_what_breaks_a_bound_is_not_good_enough(tmp_path: Path):
    spec = load(tmp_path, "limits.target=0.3")
    broken = view(0, [0.4])
    broken.violations["clip_t.at_least"] = 0.1
    assert reached(spec, [broken], Usage()) is None
    assert reached(spec, [broken, view(1, [0.3])], Usage()) == "limits.target: trial 1 has 0.3, of 0.3"


def test_time_is_counted_while_a_controller_works_and_for_jobs_that_outlive_it(tmp_path: Path):
    moments, days, events = itertools.count(100, 60), iter([1000.0, 1060.0, 1120.0]), tmp_path / "events.jsonl"
    meter = Meter(tmp_path, num_ranks=2, clock=lambda: next(moments), now=lambda: next(days))
    meter.tick([])
    for state in (JobState.QUEUED, JobState.RUNNING):
        meter.saw("a", state, events)
        meter.saw("b", JobState.RUNNING, events)
        meter.tick(["a", "b", "c"])
    assert (meter.usage.seconds, meter.usage.device_seconds) == (120, 2 * (60 + 2 * 60))
    assert [meter.at_work(job) for job in "abc"] == [60, 120, 0]
    again = Meter(tmp_path, clock=lambda: next(moments), now=lambda: 2120.0)
    events.touch()
    os.utime(events, (1420, 1420))
    again.tick(["a", "b", "c"])
    again.saw("a", JobState.RUNNING, events)  # since 1120
    again.saw("b", JobState.ENDED, events)  # its last word is of 1420
    again.saw("c", JobState.QUEUED, events)
    assert (again.usage.seconds, again.usage.device_seconds) == (120, 360 + 1000 + 300)
    assert [again.at_work(job) for job in "abc"] == [60 + 1000, 120 + 300, 0]
    assert read_usage(tmp_path) == again.usage


def test_a_clock_that_was_set_back_takes_nothing_back(tmp_path: Path):
    write_atomically(usage_file(tmp_path), Usage(seconds=5, device_seconds=5, saved=9e9).model_dump_json())
    meter = Meter(tmp_path)
    meter.tick(["a"])
    meter.saw("a", JobState.RUNNING, tmp_path / "events.jsonl")
    assert (meter.usage.seconds, meter.usage.device_seconds) == (5, 5)


@pytest.mark.parametrize(("limit", "usage"), [("hours", "seconds"), ("gpu_hours", "device_seconds")])
def test_time_that_was_used_up_starts_no_trial_more(cluster: Cluster, tmp_path: Path, limit: str, usage: str):
    spec = spec_of(tmp_path, f"limits.{limit}=1", "limits.trials=3")
    write_atomically(usage_file(spec.root), Usage.model_validate({usage: 3600.0}).model_dump_json())
    study, _ = drive(spec)
    assert not study.trials
    study, _ = drive(spec_of(tmp_path, f"limits.{limit}=2", "limits.trials=3"))
    assert states(study) == ["COMPLETE"] * 3


def test_checkpoints_of_the_worst_go_first_and_of_the_best_and_pinned_never(tmp_path: Path):
    kinds = [("COMPLETE", [0.3]), ("COMPLETE", [0.1]), ("PRUNED", None), ("COMPLETE", [0.9]), ("FAIL", None)]
    kinds += [("COMPLETE", [0.2]), ("RUNNING", None)]
    trials = [view(number, values, state, tmp_path) for number, (state, values) in enumerate(kinds)]
    for trial in trials:
        trial.run.checkpoints.mkdir(parents=True)
        (trial.run.checkpoints / "state.bin").write_bytes(bytes(MEBIBYTE))

    def left() -> set[int]:
        return {trial.number for trial in trials if trial.run.checkpoints.exists()}

    limits = Limits(disk_gib=4.5 * MEBIBYTE / 2**30, pinned=(1,))
    Quota(limits).enforce(trials)
    assert left() == {0, 1, 3, 5, 6}  # failed and pruned went; a running one is not counted
    quota = Quota(limits.model_copy(update={"disk_gib": 1.5 * MEBIBYTE / 2**30}))
    quota.enforce(trials)
    assert left() == {1, 3, 6}
    quota.enforce(trials)
    assert left() == {1, 3, 6}


def test_checkpoints_are_deleted_while_a_study_runs_and_after_a_kill(cluster: Cluster, tmp_path: Path):
    def behave(run: RunDir) -> None:
        run.checkpoints.mkdir(exist_ok=True)
        (run.checkpoints / "state.bin").write_bytes(bytes(MEBIBYTE))
        by_number(0.2, 0.1, 0.5, 0.4, 0.3, 0.0)(run)

    cluster.behaviour = behave
    cluster.rng, cluster.crash = random.Random(0), 0.2
    spec = spec_of(tmp_path, f"limits={{trials: 6, disk_gib: {2.5 * MEBIBYTE / 2**30}}}")
    study, crashes = drive(spec)
    assert crashes
    assert states(study) == ["COMPLETE"] * 6
    assert {path.parent.name for path in spec.root.glob("trials/*/checkpoints")} == {"0002", "0003"}


def test_keeping_without_deleting_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="got keep or pinned without disk_gib"):
        load(tmp_path, "limits.pinned=[3]")


def test_a_plan_counts_on_the_checkpoints_that_are_deleted(tmp_path: Path):
    build_world(tmp_path)
    many = "limits.trials=1000"
    whole, kept = (estimate_rest(load(tmp_path, many, *sets)) for sets in ((), ("limits.disk_gib=0.001",)))
    bounded = estimate_rest(load(tmp_path, many, "limits.disk_gib=1000"))
    assert bounded.disk_bytes == whole.disk_bytes
    assert "of checkpoints that limits.disk_gib deletes" in kept.disk_formula
    few = estimate_rest(load(tmp_path, "limits.trials=2"))
    assert few.disk_bytes < kept.disk_bytes < whole.disk_bytes


def test_a_plan_measures_what_finished_trials_leave_without_their_checkpoints(tmp_path: Path):
    spec = load(tmp_path, "limits.trials=12", "limits.disk_gib=0.01")
    run, result = RunDir(tmp_path / "0000"), RunResult(scores={}, seconds={}, peak_bytes=1, versions={})
    write_atomically(run.log, "x" * 1000)
    write_atomically(run.checkpoints / "10", "x" * 4 * MEBIBYTE)
    needed = estimate(spec, [(run.path, result)], 2)
    room = int(0.01 * 2**30) - 4 * MEBIBYTE
    assert needed.disk_bytes == 10 * 1000 + 4 * MEBIBYTE + room  # one trial runs, the others share the room
