"""Bounds, several values and the untrained model in the reconcile loop, against a cluster that kills controllers."""

# pyright: basic

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.launcher import JobId, JobState
from orchestrator.tables import best_trial, won
from orchestrator.views import trial_views
from tests.orchestrator.cluster import Cluster, begin, drive, fail_with, spec_of, states
from tests.orchestrator.studies import TREE, load, score
from trainers.errors import ConfigError, LaunchError, StorageError
from trainers.rundir import RunDir, thaw


def by_rate(run: RunDir) -> None:
    """Higher rates give a better picture-picture and a worse text-picture score."""
    rate = thaw(run.trial)["train"]["optimizer"]["lr"]
    score(run, clip_t=0.3 - 10 * rate, clip_i=0.5 + rate)


NEEDS_BASE = "objective={kind: constrained, maximise: {clip_i: 1}, subject_to: {clip_t: {below_base: 0.5}}}"
BOUNDED = "objective={kind: constrained, maximise: {clip_i: 1}, subject_to: {clip_t: {at_least: 0.28}}}"


def test_a_trial_that_breaks_a_bound_counts_and_is_never_the_best(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = by_rate
    cluster.rng, cluster.crash = random.Random(3), 0.1
    spec = spec_of(tmp_path, BOUNDED)
    study, _ = drive(spec)
    assert states(study) == ["COMPLETE"] * 8
    for trial in study.trials:
        assert trial.constraints == {"clip_t.at_least": pytest.approx(10 * trial.params["train.optimizer.lr"] - 0.02)}
    kept = [trial for trial in study.trials if trial.params["train.optimizer.lr"] <= 2e-3]
    assert 0 < len(kept) < 8
    winner, value = best_trial(spec, trial_views(spec, study))
    assert [value] == winner.values == max(trial.values for trial in kept)


def test_no_trial_that_keeps_all_bounds_is_said_with_the_nearest(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = by_rate
    spec = spec_of(tmp_path, BOUNDED.replace("0.28", "0.5"), "limits.trials=3")
    study, _ = drive(spec)
    with pytest.raises(StorageError, match=r"got 3 scored trials that each break a bound, the nearest trial \d, which"):
        best_trial(spec, trial_views(spec, study))


def test_the_base_is_measured_once_and_before_the_first_trial(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = lambda run: score(run, clip_t=0.3) if run.path.name == "base" else by_rate(run)
    cluster.rng, cluster.crash, cluster.lose = random.Random(1), 0.1, 0.2
    sets = (BOUNDED.replace("at_least: 0.28", "below_base: 0.05"), "limits.max_retries=9")
    study, _ = drive(spec_of(tmp_path, *sets))
    runs = [job["run"].path.name for job in cluster.jobs.values()]
    first_trial = runs.index("0000")
    assert set(runs[:first_trial]) == {"base"}
    assert "base" not in runs[first_trial:]
    assert cluster.jobs[JobId("0")]["job"].arguments[-1] == "--untrained"
    broken = [trial.constraints["clip_t.below_base"] for trial in study.trials]
    assert broken == pytest.approx([10 * trial.params["train.optimizer.lr"] - 0.05 for trial in study.trials])


def test_a_base_that_cannot_be_measured_ends_the_study_and_is_tried_again_later(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = lambda run: fail_with("model", "no weights")(run) if run.path.name == "base" else by_rate(run)
    sets = (BOUNDED.replace("at_least: 0.28", "below_base: 0.05"), "limits.trials=2")
    with pytest.raises(LaunchError, match="base: got model: no weights"):
        drive(spec_of(tmp_path, *sets))
    cluster.behaviour = score
    study, _ = drive(spec_of(tmp_path, *sets))
    assert states(study) == ["COMPLETE"] * 2


PARETO = "objective={kind: pareto, objectives: {fidelity: {clip_i: 1}, text: {clip_t: 1}}}"


def test_several_values_end_in_a_front(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = by_rate
    cluster.rng, cluster.crash = random.Random(2), 0.1
    spec = spec_of(tmp_path, PARETO, "sampler={kind: tpe, startup_trials: 3}", "limits.trials=12")
    study, _ = drive(spec)
    assert states(study) == ["COMPLETE"] * 12
    front = won(spec, trial_views(spec, study))
    assert [trial.number for trial in front] == sorted(
        range(12), key=lambda number: -study.trials[number].params["train.optimizer.lr"]
    )  # every rate is a compromise of its own
    with pytest.raises(ConfigError, match="got several values"):
        best_trial(spec, trial_views(spec, study))


class Reporter(dict[JobId, dict[str, Any]]):
    """A cluster's jobs, which report once when they begin: picture-picture and text-picture score by trial."""

    def __init__(self, reported: list[tuple[float, float]]) -> None:
        self.reported = reported

    def __setitem__(self, job_id: JobId, job: dict[str, Any]) -> None:
        super().__setitem__(job_id, job)
        one, two = self.reported[int(job["run"].path.name)]
        scores = {"clip_i": one, "clip_t": two}
        job["run"].append("report", step=10, scores=scores, prompts={name: [v] for name, v in scores.items()})


def test_a_compromise_that_none_beats_in_all_values_goes_on(cluster: Cluster, tmp_path: Path):
    """The default percentile condemns each after the second by each value alone."""
    cluster.jobs = Reporter([(0.9, 0.1), (0.1, 0.9), (0.85, 0.15), (0.15, 0.85), (0.5, 0.5), (0.5, 0.4)])
    sets = ("pruner={kind: percentile, startup_trials: 1}", "trial.report={every: 10}", "limits.trials=6")
    study, _ = drive(spec_of(tmp_path, PARETO, *sets, "sampler={kind: random}"))
    assert states(study) == ["COMPLETE"] * 5 + ["PRUNED"]


def test_of_several_values_a_trial_ends_only_if_the_pruner_ends_it_by_each(cluster: Cluster, tmp_path: Path):
    cluster.jobs = Reporter([(0.5, 0.5), (0.4, 0.6), (0.3, 0.4), (0.6, 0.4), (0.45, 0.55)])
    cluster.rng, cluster.crash = random.Random(4), 0.1
    sets = ("pruner={kind: median, startup_trials: 1}", "trial.report={every: 10}", "limits.trials=5")
    study, crashes = drive(spec_of(tmp_path, PARETO, *sets, "sampler={kind: random}"))
    assert crashes
    assert states(study) == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE", "COMPLETE"]
    assert study.trials[2].user_attrs["message"] == "median ended it after step 10, at 0.3, 0.4"
    assert len(cluster.jobs) == 5


@pytest.mark.parametrize(
    ("sets", "problem"),
    [
        ([PARETO, "confirm_seeds=2"], "confirm_seeds: got 2 with an objective of several values; expected 0"),
        ([BOUNDED.replace("at_least: 0.28", "")], "objective.subject_to.clip_t: got no bound"),
        ([BOUNDED.replace("clip_t", "clip_x")], "objective: got score 'clip_x'"),
        ([BOUNDED.replace("0.28", "0.28, at_most: 0.1")], "expected the first to be lower"),
    ],
)
def test_an_objective_that_has_no_answer_is_refused(cluster: Cluster, tmp_path: Path, sets: list[str], problem: str):
    with pytest.raises(ConfigError, match=problem):
        spec_of(tmp_path, *sets)


def test_a_search_along_a_line_follows_one_value_alone(tmp_path: Path):
    tree = {
        **TREE,
        "sampler": {"kind": "golden_section"},
        "search": {"train.optimizer.lr": {"kind": "float", "low": 1e-4, "high": 1e-2}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
    load(tmp_path, BOUNDED)
    with pytest.raises(ConfigError, match="objective: got an objective of several values"):
        load(tmp_path, PARETO)


def test_the_base_may_wait_in_a_queue(cluster: Cluster, tmp_path: Path):
    cluster.progress, cluster.first_state = lambda: None, JobState.QUEUED
    waiting = begin(spec_of(tmp_path, "launcher.timeout_minutes=1", NEEDS_BASE))
    moments = itertools.count(0, 3600)
    waiting._meter.clock = lambda: next(moments)
    for _ in range(5):
        waiting.step()
    assert not cluster.cancelled
    assert waiting._meter.usage.device_seconds == 0


def test_the_base_waits_for_a_device(cluster: Cluster, tmp_path: Path):
    cluster.num_devices = 0
    waiting = begin(spec_of(tmp_path, NEEDS_BASE))
    waiting.step()
    assert not cluster.jobs
    cluster.num_devices = 1
    waiting.step()
    assert cluster.jobs[JobId("0")]["job"].devices == (0,)
