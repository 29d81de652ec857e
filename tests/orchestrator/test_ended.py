"""When a study has ended, for a stage that waits for it and for who submits it as one job."""

# pyright: basic

import json
from pathlib import Path

import pytest
import yaml

from orchestrator import inside
from orchestrator.__main__ import main
from orchestrator.launcher import JobId, JobState
from orchestrator.series import WINNER, load_series
from orchestrator.spec import StudySpec
from tests.orchestrator.cluster import Cluster, Crash, spec_of
from tests.orchestrator.studies import build_world, score
from trainers.rundir import RunDir, thaw

FAKE = "launcher={kind: fake, poll_seconds: 1e-6}"
LINE = (
    "search={evaluate.guidance.scale: {kind: float, low: 1, high: 9}, train.optimizer.lr: null, train.lora.rank: null}",
    "trial.evaluate.guidance={kind: cfg, scale: 5.0}",
    "sampler={kind: golden_section, tolerance: 2.0}",
    "limits.trials=14",
)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    build_world(tmp_path)
    return tmp_path


def kill(*_: object) -> None:
    raise Crash


def advance(cluster: Cluster, spec: StudySpec) -> str:
    standing = inside.advance(spec, [FAKE])
    if standing == "submitted":
        known = JobId((inside.run_dir(spec).path / "job_id.txt").read_text())
        cluster.jobs[known]["state"] = JobState.ENDED  # `work` is what it does
    return standing


def work(spec: StudySpec) -> int:
    return main(["run", str(inside.run_dir(spec).path / inside.FILE)])


def test_a_search_that_ends_by_itself_is_finished_until_more_is_asked_for(cluster: Cluster, world: Path):
    def behave(run: RunDir) -> None:
        score(run, clip_t=-((thaw(run.trial)["evaluate"]["guidance"]["scale"] - 3) ** 2))

    cluster.behaviour = behave
    spec = spec_of(world, *LINE)
    inner = inside.run_dir(spec).path / "runs" / "t"
    assert advance(cluster, spec) == "submitted"
    assert work(spec) == 0
    assert advance(cluster, spec) == "finished"
    assert len(list(inner.glob("trials/*"))) < 14
    winner = (inner / WINNER).read_text()
    more = spec_of(world, *LINE, "sampler.tolerance=0.5", "limits.parallel=2")
    assert advance(cluster, more) == "submitted"
    cluster.crash = 1
    with pytest.raises(Crash):
        work(more)
    cluster.crash = 0
    (inner / WINNER).write_text(winner)  # as S3 brings it back, which is not told of what is removed
    assert advance(cluster, more) == "submitted"
    assert work(more) == 0
    assert advance(cluster, more) == "finished"


def test_a_study_whose_comparison_was_cut_off_is_not_finished(
    cluster: Cluster, world: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = spec_of(world, "limits.trials=2", "confirm_seeds=1")
    monkeypatch.setattr("orchestrator.confirm.confirm", kill)
    assert advance(cluster, spec) == "submitted"
    with pytest.raises(Crash):
        work(spec)
    assert advance(cluster, spec) == "submitted"


def test_a_study_in_which_nobody_can_win_is_finished_with_all_its_trials(cluster: Cluster, world: Path):
    bound = "objective={kind: constrained, maximise: {clip_t: 1.0}, subject_to: {clip_i: {at_least: 0.9}}}"
    spec = spec_of(world, "limits.trials=2", bound)
    assert advance(cluster, spec) == "submitted"
    assert work(spec) == 2
    assert advance(cluster, spec) == "finished"


def test_a_stage_that_is_extended_has_not_ended_until_it_has_again(
    cluster: Cluster, world: Path, monkeypatch: pytest.MonkeyPatch
):
    path = world / "several.yaml"
    one, two = {"extends": ["./study.yaml"], "limits": {"trials": 1}}, {"extends": ["./study.yaml"], "search": None}
    stages = {"a": one, "b": {**two, "from_study": {"study": "a"}}}
    path.write_text(yaml.safe_dump({"name": "n", "output": "./runs", "stages": stages}))
    words = ["run", str(path), "--only", "a", "--set", FAKE]
    assert main(words) == 0
    root, words = world / "runs" / "n-a", [*words, "--set", "stages.a.limits.trials=3"]
    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.controller.Controller._score", kill)
        with pytest.raises(Crash):
            main(words)
    assert load_series(path).members[1].waits_for == root
    assert main(words) == 0
    assert load_series(path).members[1].waits_for is None
    before = json.loads((root / WINNER).read_text())
    assert main(words) == 0  # with nothing to do
    assert json.loads((root / WINNER).read_text()) == before
    assert len(cluster.jobs) == 3
