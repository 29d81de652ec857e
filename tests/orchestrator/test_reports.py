"""Reports of running trials, and what pruners do with them, against a cluster that kills controllers."""

# pyright: basic

import random
from pathlib import Path
from typing import Any

import pytest

from orchestrator.controller import Controller
from orchestrator.launcher import JobId
from tests.orchestrator.cluster import Cluster, Crash, begin, die, drive, spec_of, states
from trainers.errors import ConfigError
from trainers.rundir import RunDir

BAD = {"clip_t": 0.1, "clip_i": 0.1}


def test_a_pruned_trial_is_ended_and_counts_with_its_last_value(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = lambda run: None

    class Reporter(dict[JobId, dict[str, Any]]):
        def __setitem__(self, job_id: JobId, job: dict[str, Any]) -> None:
            super().__setitem__(job_id, job)
            job["run"].append("report", step=10, scores={"clip_t": 0.1, "clip_i": 1}, prompts={"clip_t": [0.1, 0.1]})

    cluster.jobs = Reporter()
    study, _ = drive(spec_of(tmp_path, "pruner={kind: threshold}", "trial.report={every: 10}", "limits.trials=3"))
    assert states(study) == ["PRUNED"] * 3
    assert [trial.value for trial in study.trials] == [0.1] * 3
    assert study.trials[0].user_attrs["message"] == "threshold ended it after step 10, at 0.1"
    assert cluster.cancelled == ["0", "1", "2"]


def test_a_pruned_trial_frees_its_place_at_once_and_being_killed_changes_no_verdict(cluster: Cluster, tmp_path: Path):
    """Every second trial reports that it is poor; the median ends it long before it would have been scored."""

    class Reporter(dict[JobId, dict[str, Any]]):
        def __setitem__(self, job_id: JobId, job: dict[str, Any]) -> None:
            super().__setitem__(job_id, job)
            value = 0.5 - 0.3 * (int(job["run"].path.name) % 2)
            job["run"].append("report", step=10, scores={"clip_t": value}, prompts={"clip_t": [value]})

    cluster.jobs = Reporter()
    cluster.rng, cluster.crash = random.Random(1), 0.1
    sets = ("pruner={kind: median, startup_trials: 1}", "trial.report={every: 10}", "limits.trials=6")
    study, crashes = drive(spec_of(tmp_path, *sets, "sampler={kind: random}"))
    assert crashes
    assert states(study) == ["COMPLETE", "PRUNED"] * 3
    assert [trial.intermediate_values for trial in study.trials] == [{10: 0.5}, {10: 0.2}] * 3
    assert len(cluster.jobs) == 6


def test_each_report_is_judged_also_if_several_are_read_at_once(cluster: Cluster, tmp_path: Path):
    """The second trial is poor at the rung, and best at the report after it."""

    class Reporter(dict[JobId, dict[str, Any]]):
        def __setitem__(self, job_id: JobId, job: dict[str, Any]) -> None:
            super().__setitem__(job_id, job)
            number = int(job["run"].path.name)
            for step, value in ((10, 0.5 - 0.3 * number), (20, 0.5 + 0.3 * number)):
                job["run"].append("report", step=step, scores={"clip_t": value}, prompts={"clip_t": [value]})

    cluster.jobs = Reporter()
    cluster.rng, cluster.crash = random.Random(1), 0.1
    sets = ("pruner={kind: asha, min_steps: 10}", "trial.report={every: 10}", "limits.trials=2")
    study, crashes = drive(spec_of(tmp_path, *sets, "sampler={kind: random}"))
    assert crashes
    assert states(study) == ["COMPLETE", "PRUNED"]


def test_a_trial_that_was_being_pruned_when_its_controller_was_killed_is_pruned(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = lambda run: None
    sets = ("limits.trials=1", "limits.max_retries=0", "pruner={kind: threshold}", "trial.report={every: 10}")
    spec = spec_of(tmp_path, *sets)
    doomed = begin(spec)
    doomed.step()
    RunDir(spec.root / "trials" / "0000").append("report", step=10, scores=BAD, prompts={name: [0.1] for name in BAD})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Controller, "_end", die)
        with pytest.raises(Crash):
            doomed.step()
    study, _ = drive(spec)
    assert states(study) == ["PRUNED"]


@pytest.mark.parametrize(
    ("sets", "problem"),
    [
        (["pruner={kind: median}"], "pruner: got median without trial.report"),
        (["trial.report={every: 300}"], "trial.report.every: got 300 for trials of at most 300 steps"),
        (["pruner={kind: hyperband, min_steps: 9, max_steps: 9}"], "pruner.*expected more than min_steps 9"),
    ],
)
def test_a_pruner_that_could_never_judge_is_refused(cluster: Cluster, tmp_path: Path, sets: list[str], problem: str):
    with pytest.raises(ConfigError, match=problem):
        spec_of(tmp_path, *sets)
