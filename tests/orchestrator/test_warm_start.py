"""A study that begins with parameters, or with the trials of an earlier one."""

# pyright: basic

import os
import shutil
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from orchestrator import beginning
from orchestrator.beginning import find_beginning
from orchestrator.spec import StudySpec
from orchestrator.storage import open_study
from tests.contracts.storage import close
from tests.orchestrator.cluster import Cluster, drive, fail_with, spec_of, states
from tests.orchestrator.studies import load, score
from trainers.errors import ConfigError, StorageError
from trainers.rundir import RunDir, thaw

LR, RANK = "train.optimizer.lr", "train.lora.rank"
WIDER = "search={train.optimizer.lr: {kind: float, low: 1e-4, high: 1.0, log: true}}"
RANDOM = "sampler={kind: random}"


def learn(run: RunDir) -> None:
    """Scores follow from the parameters, and a job leaves more than scores."""
    run.append("train", step=1, loss=1.0)
    run.adapter.mkdir()
    (run.adapter / "weights").write_text("adapter")
    run.checkpoints.mkdir()
    score(run, clip_t=thaw(run.trial)["train"]["optimizer"]["lr"])


@pytest.fixture
def earlier(cluster: Cluster, tmp_path: Path) -> StudySpec:
    """A study with four scored trials and one that failed."""
    cluster.behaviour = lambda run: fail_with("data")(run) if run.path.name == "0002" else learn(run)
    spec = spec_of(tmp_path, RANDOM, "limits.trials=4")
    study, _ = drive(spec)
    assert sorted(states(study)) == ["COMPLETE"] * 4 + ["FAIL"]
    cluster.jobs.clear()
    cluster.behaviour = learn
    return spec


def later(earlier: StudySpec, *sets: str, warm: str = "") -> StudySpec:
    start = f"warm_start={{study: {earlier.root}{warm}}}"
    return spec_of(earlier.output.parent, "name=later", RANDOM, "limits.trials=6", start, *sets)


def params(study: optuna.Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.trials]


def test_named_parameters_come_after_the_defaults_and_before_the_sampler(cluster: Cluster, tmp_path: Path):
    start = "warm_start={params: [{train.lora.rank: 16}, {train.optimizer.lr: 0.005, train.lora.rank: 4}]}"
    study, _ = drive(spec_of(tmp_path, start, "limits.trials=4"))
    assert params(study)[:3] == [{LR: 1e-3, RANK: 8}, {LR: 1e-3, RANK: 16}, {LR: 5e-3, RANK: 4}]


def test_a_wider_study_has_the_earlier_one_s_results_without_running_anything(cluster: Cluster, earlier: StudySpec):
    known = {lr: value for lr, value in ((t.params[LR], t.value) for t in drive(earlier)[0].trials) if value}
    spec = later(earlier, WIDER)
    study, _ = drive(spec)
    assert states(study) == ["COMPLETE"] * 6
    assert all(trial.value == known[trial.params[LR]] for trial in study.trials[:4])
    assert len(cluster.jobs) == 2
    taken = RunDir(spec.root / "trials" / "0001")
    assert (taken.adapter / "weights").read_text() == "adapter"
    assert [event["event"] for _, event in taken.read_events()] == ["train"]
    assert not taken.checkpoints.exists()
    notes = study.user_attrs["sampler_notes"]
    assert notes == [
        f"warm start: 4 trials of {earlier.root} are taken over with their results",
        "warm start: 1 left out, because it was not scored",
    ]


def test_killed_anywhere_it_takes_over_each_once(earlier: StudySpec, cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    copy = beginning._copy

    def copy_and_perhaps_die(*names: Any) -> None:
        cluster.maybe_crash()
        copy(*names)

    monkeypatch.setattr(beginning, "_copy", copy_and_perhaps_die)
    cluster.crash = 0.3
    study, crashes = drive(later(earlier, WIDER))
    assert crashes > 3
    assert states(study) == ["COMPLETE"] * 6
    assert len({trial.params[LR] for trial in study.trials}) == 6


def test_what_differs_is_said_and_run_again(cluster: Cluster, earlier: StudySpec):
    spec = later(earlier, "trial.train.steps=500")
    study, _ = drive(spec)
    assert params(study)[:4] == [trial.params for trial in drive(earlier)[0].trials if trial.value]
    assert len(cluster.jobs) == 6
    assert study.user_attrs["sampler_notes"] == [
        f"warm start: 0 trials of {earlier.root} are taken over with their results",
        "warm start: 4 are run again, because train.steps was 300 and is 500 in one of them",
        "warm start: 1 left out, because it was not scored",
    ]


def test_pictures_that_were_changed_since_are_said_and_the_trials_run_again(cluster: Cluster, earlier: StudySpec):
    (pictures := earlier.trial.train.data.path).mkdir()
    (pictures / "0.png").write_bytes(b"another picture")
    os.utime(pictures / "0.png", (time.time() + 60,) * 2)
    found = find_beginning(later(earlier))
    assert [one.run for one in found.trials] == [None] * len(found.trials)
    assert any("train.data.path was changed after the trial began" in note for note in found.notes), found.notes


def test_trials_outside_of_a_narrower_search_are_left_out(earlier: StudySpec):
    narrow = "search={train.optimizer.lr: {kind: float, low: 1e-3, high: 1.1e-3}}"
    found = find_beginning(later(earlier, narrow))
    assert [one.params[LR] for one in found.trials] == [1e-3]
    assert "3 left out, because train.optimizer.lr is outside of what is searched" in found.notes[1]


def test_the_best_few_can_be_chosen(cluster: Cluster, earlier: StudySpec):
    values = sorted((trial.value for trial in drive(earlier)[0].trials if trial.value), reverse=True)
    found = find_beginning(later(earlier, warm=", best: 2"))
    chosen = {one.params[LR] for one in found.trials if one.run}
    assert chosen == set(values[:2])


def test_it_keeps_to_what_it_began_with_when_the_earlier_study_is_gone(cluster: Cluster, earlier: StudySpec):
    def fail(run: RunDir) -> None:
        raise KeyboardInterrupt

    cluster.behaviour = fail
    spec = later(earlier, WIDER)
    wanted = [one.params for one in find_beginning(spec).trials]
    with pytest.raises(KeyboardInterrupt):
        drive(spec)
    shutil.rmtree(earlier.root)
    cluster.behaviour = learn
    study, _ = drive(spec)
    assert params(study)[:4] == wanted


@pytest.mark.parametrize(
    ("sets", "problem"),
    [
        ("warm_start={}", "warm_start: got neither params nor study"),
        ("warm_start={best: 2, params: [{train.lora.rank: 8}]}", "got best without study"),
        ("warm_start={params: [{}]}", "warm_start.params.0: got nothing"),
        ("warm_start={params: [{train.lora.rnk: 8}]}", "did you mean 'train.lora.rank'"),
        ("warm_start={params: [{train.lora.rank: 5}]}", "warm_start.params.0.train.lora.rank: got 5; expected a value"),
    ],
)
def test_what_cannot_be_tried_is_refused(tmp_path: Path, sets: str, problem: str):
    with pytest.raises(ConfigError, match=problem):
        load(tmp_path, sets)


def test_a_sampler_that_says_where_to_begin_is_refused(tmp_path: Path):
    line = "search={train.lora.rank: null, train.optimizer.lr: {kind: float, low: 1e-4, high: 1e-2, log: false}}"
    sets = (
        "warm_start={params: [{train.optimizer.lr: 0.005}]}",
        line,
        "sampler={kind: golden_section}",
        "limits.trials=99",
    )
    with pytest.raises(ConfigError, match="warm_start: got a sampler that says itself where to begin"):
        load(tmp_path, *sets)


def test_more_than_there_is_room_for_is_refused(earlier: StudySpec):
    message = "got 4 trials to begin with, the defaults among them; expected at most limits.trials, 3"
    with pytest.raises(ConfigError, match=message):
        find_beginning(later(earlier, "limits.trials=3"))


def test_a_folder_that_is_no_study_is_refused(cluster: Cluster, tmp_path: Path):
    with pytest.raises(ConfigError, match="expected the folder of a study, with trials in it"):
        find_beginning(spec_of(tmp_path, f"warm_start={{study: {tmp_path}}}"))


def test_widening_a_study_names_the_way(tmp_path: Path):
    close(open_study(load(tmp_path)))
    way = r"search.train.optimizer.lr.high was 0.01 and is 1.0.* `warm_start: \{study: .*runs/t\}`"
    with pytest.raises(StorageError, match=way):
        open_study(load(tmp_path, WIDER))
    with pytest.raises(StorageError, match=r"warm_start.params was absent and is"):
        open_study(load(tmp_path, "warm_start={params: [{train.lora.rank: 8}]}"))
