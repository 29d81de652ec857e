# pyright: basic
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from orchestrator.ledger import read_trials
from orchestrator.mlflow_mirror import flatten
from orchestrator.progress import objectives, scores
from orchestrator.storage import open_study
from orchestrator.tracker import Evidence
from orchestrator.trackers.mlflow import MlflowTracker
from orchestrator.views import trial_views
from tests.contracts.tracker import Curves, TrackerContract
from tests.orchestrator.mlflow_store import child, opened, runs, snapshot
from tests.orchestrator.studies import load
from tests.orchestrator.views import FakeStudy
from trainers.rundir import RunResult, Score


class TestMlflowTracker(TrackerContract):
    @pytest.fixture
    def tracker(self) -> MlflowTracker:
        return MlflowTracker()

    def curves(self, study: FakeStudy, number: int) -> Curves:
        if opened(study).get_experiment_by_name(study.name) is None:
            return {}
        run = child(study, number)
        keys = {key: opened(study).get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        return {key: [(point.step, point.value) for point in points] for key, points in keys.items()}

    def pictures(self, study: FakeStudy, number: int) -> list[tuple[str, int]]:
        files = opened(study).list_artifacts(child(study, number).info.run_id, "images")
        names = [file.path.removeprefix("images/").split("+") for file in files if file.path.endswith(".png")]
        return sorted((name.replace("~", "/"), int(step)) for name, _, step, *_ in names)


def test_a_finished_trial_is_all_there(study: FakeStudy) -> None:
    run = study.start()
    study.train(run, 10)
    study.train(run, 20)
    study.complete(run, 0.3)
    MlflowTracker().mirror(study.view, study.trials)
    found = child(study)
    assert found.info.status == "FINISHED"
    assert found.data.params["train.optimizer.lr"] == "0.1"
    assert found.data.params["train.kind"] == "sdxl_lora"
    assert found.data.metrics["clip_t/clip-0123456789ab"] == 0.3
    assert found.data.metrics["clip_t/clip-0123456789ab_se"] == 0.01
    assert found.data.metrics["objective"] == 0.3
    assert found.data.metrics["seconds/train"] == 12.0
    tags = found.data.tags
    assert (tags["state"], tags["study"], tags["trial"]) == ("COMPLETE", "zog", "0")
    assert tags["mlflow.source.git.commit"] == "c0ffee"
    assert tags["version.commit"] == "c0ffee+changes"
    assert tags["version.torch"] == "2.15.0"
    assert tags["config_sha256"] == "c0de"
    assert len(tags["trial_sha256"]) == 64
    history = opened(study).get_metric_history(found.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(10, 0.1), (20, 0.05)]
    names = {file.path for file in opened(study).list_artifacts(found.info.run_id)}
    assert names == {"trial.yaml", "records.jsonl", "adapter", "images"}


def test_children_stand_under_the_study_s_run(study: FakeStudy) -> None:
    study.complete(study.start())
    study.start()
    MlflowTracker().mirror(study.view, study.trials)
    (parent,) = [run for run in runs(study) if "trial" not in run.data.tags]
    assert parent.info.run_name == "zog"
    assert parent.info.status == "RUNNING"
    parents = {
        run.data.tags["mlflow.parentRunId"] for run in runs(study) if run is not parent and "trial" in run.data.tags
    }
    assert parents == {parent.info.run_id}
    assert [file.path for file in opened(study).list_artifacts(parent.info.run_id)] == ["study.yaml"]
    assert len(runs(study)) == 3


def test_a_study_s_run_ends_with_its_trials_and_wakes_with_a_new_one(study: FakeStudy) -> None:
    tracker = MlflowTracker()
    study.complete(study.start())
    tracker.mirror(study.view, study.trials)
    assert {run.info.status for run in runs(study)} == {"FINISHED"}
    study.start()
    tracker.mirror(study.view, study.trials)
    assert [run.info.status for run in runs(study) if "trial" not in run.data.tags] == ["RUNNING"]


def test_mirroring_again_changes_nothing(study: FakeStudy) -> None:
    finished, running = study.start(), study.start()
    study.train(finished, 10)
    study.train(running, 10)
    study.complete(finished)
    tracker = MlflowTracker()
    tracker.mirror(study.view, study.trials)
    before = snapshot(study)
    tracker.mirror(study.view, study.trials)
    MlflowTracker().mirror(study.view, study.trials)
    assert snapshot(study) == before


def test_nothing_new_means_no_call_to_the_store(study: FakeStudy) -> None:
    study.complete(study.start())
    study.train(study.start(), 10)
    tracker = MlflowTracker()
    tracker.mirror(study.view, study.trials)
    (study.output / "mlflow.db").unlink()
    tracker.mirror(study.view, study.trials)
    assert not (study.output / "mlflow.db").exists()


def test_steps_that_a_lost_job_repeats_are_sent_once(study: FakeStudy) -> None:
    run = study.start()
    for step in (10, 20, 30):
        study.train(run, step)
    tracker = MlflowTracker()
    tracker.mirror(study.view, study.trials)
    for step in (20, 30, 40):
        study.train(run, step)
    tracker.mirror(study.view, study.trials)
    history = opened(study).get_metric_history(child(study).info.run_id, "train/loss")
    assert [point.step for point in history] == [10, 20, 30, 40]


def test_a_long_history_is_sent_in_parts(study: FakeStudy) -> None:
    run = study.start()
    for step in range(1, 501):
        study.train(run, step)
    MlflowTracker().mirror(study.view, study.trials)
    assert len(opened(study).get_metric_history(child(study).info.run_id, "train/lr")) == 500


def test_parameters_may_be_long_many_and_of_any_script(study: FakeStudy) -> None:
    many = {f"key{number}": number for number in range(230)}
    study.start(prompt="ein Zög 猫 " * 2000, many=many, strange={"a key/with: signs?": [1, None]})
    MlflowTracker().mirror(study.view, study.trials)
    params = child(study).data.params
    assert params["train.prompt"].startswith("ein Zög 猫 ")
    assert params["train.prompt"].endswith("(all of it is in trial.yaml)")
    assert len(params["train.prompt"]) == 6000
    assert params["train.many.key229"] == "229"
    assert params["train.strange.a key-with- signs-"] == "[1, null]"


def test_undefined_numbers_are_kept_as_such(study: FakeStudy) -> None:
    run = study.start()
    study.train(run, 10, loss=float("nan"))
    study.train(run, 20, loss=float("inf"))
    study.complete(run, 0.5, clip_t=float("nan"))
    MlflowTracker().mirror(study.view, study.trials)
    metrics = child(study).data.metrics
    assert metrics["clip_t/clip-0123456789ab"] != metrics["clip_t/clip-0123456789ab"]
    history = opened(study).get_metric_history(child(study).info.run_id, "train/loss")
    assert [point.step for point in history] == [10, 20]


@pytest.mark.parametrize(("state", "status"), [("PRUNED", "KILLED"), ("FAIL", "FAILED")])
def test_a_trial_that_did_not_finish_says_why(study: FakeStudy, state: str, status: str) -> None:
    study.end(study.start(), state, reason="oom at step 30: 猫")
    MlflowTracker().mirror(study.view, study.trials)
    found = child(study)
    assert found.info.status == status
    assert (found.data.tags["state"], found.data.tags["reason"]) == (state, "oom at step 30: 猫")


def test_a_trial_that_was_never_frozen_can_fail(study: FakeStudy) -> None:
    run = study.start()
    run.trial.unlink()
    study.end(run, "FAIL", reason="disk")
    MlflowTracker().mirror(study.view, study.trials)
    assert child(study).info.status == "FAILED"


def test_a_trial_that_waits_is_not_mirrored_yet(study: FakeStudy) -> None:
    study.start()
    study.trials[0] = replace(study.trials[0], state="WAITING", start=None)
    MlflowTracker().mirror(study.view, study.trials)
    assert opened(study).get_experiment_by_name("zog") is None


def test_a_study_started_anew_under_the_same_name_gets_a_run_of_its_own(study: FakeStudy) -> None:
    study.complete(study.start())
    MlflowTracker().mirror(study.view, study.trials)
    old = study.trials[0]
    assert old.start is not None
    anew = replace(old, start=old.start + timedelta(days=1), end=None, state="RUNNING")
    MlflowTracker().mirror(study.view, [anew])
    assert len(runs(study)) == 4


def test_trackers_know_a_study_by_a_time_that_is_the_same_in_every_time_zone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load(tmp_path)
    study = open_study(spec)
    study.tell(study.ask(), 0.5)
    (stored,) = read_trials(spec)
    try:
        for zone in ("UTC", "Asia/Tokyo", "America/Lima"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            (view,) = trial_views(spec, open_study(spec))
            assert (str(view.start), str(view.end)) == (str(stored.start), str(stored.end))
    finally:
        monkeypatch.undo()
        time.tzset()


def test_artifacts_lie_beside_the_store_wherever_the_process_runs(
    study: FakeStudy, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    study.complete(study.start())
    MlflowTracker().mirror(study.view, study.trials)
    assert list(elsewhere.iterdir()) == []
    assert len(list((study.output / "mlartifacts" / "zog").rglob("trial.yaml"))) == 1


def test_scores_are_named_after_the_model_that_made_them() -> None:
    score = Score(mean=0.2, standard_error=0.1, num_samples=3, num_undefined=1, model="ViT-L/14@abc")
    result = RunResult(scores={"clip_t": score}, seconds={}, peak_bytes=7, versions={})
    assert scores(result) == {
        "clip_t/ViT-L-14-abc": 0.2,
        "clip_t/ViT-L-14-abc_se": 0.1,
        "clip_t/ViT-L-14-abc_undefined": 1.0,
        "peak_bytes": 7.0,
    }


def test_several_values_have_their_names() -> None:
    assert objectives(("fidelity", "text"), [1.0, 2.0]) == {"objective/fidelity": 1.0, "objective/text": 2.0}
    assert objectives(("value",), [1.0]) == {"objective": 1.0}
    assert objectives(("value",), None) == {}


def test_the_front_and_broken_bounds_stand_with_the_study(study: FakeStudy) -> None:
    view = replace(study.view, value_names=("fidelity", "text"))
    for values in ([0.5, 0.1], [0.4, 0.0], [0.1, 0.5], [0.9, 0.9]):
        study.complete(study.start())
        study.trials[-1] = replace(study.trials[-1], values=values)
    study.trials[3] = replace(study.trials[3], violations={"clip_t.at_least": 0.25})
    MlflowTracker().mirror(view, study.trials)
    (parent,) = [run for run in runs(study) if "trial" not in run.data.tags]
    assert parent.data.tags["front"] == "0, 2"
    best = child(study, 3)
    assert best.data.metrics["violation/clip_t.at_least"] == 0.25
    assert best.data.metrics["objective/text"] == 0.9


def test_a_config_is_flattened_to_dotted_paths() -> None:
    assert flatten({"a": {"b": {"c": True}, "d": [0.1, "x"]}, "e": None, "f": "ü"}) == {
        "a.b.c": "true", "a.d": '[0.1, "x"]', "e": "null", "f": "ü",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("sqlite:///mlflow.db", "sqlite:////folder"),
        ("mysql://host/db", "expected sqlite"),
        ("http://me:secret@host", "MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_a_store_s_address_is_checked_when_the_study_is_read(uri: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MlflowTracker(uri=uri)


def test_what_fresh_seeds_said_is_sent_once_to_the_study_and_its_best_trials(study: FakeStudy) -> None:
    study.complete(study.start())
    study.complete(study.start(), value=0.5)
    folder = study.output / study.name / "confirm" / "0001-0000_4"
    folder.mkdir(parents=True)
    (folder / "confirmation.csv").write_text("contestant,value\n")
    told = replace(study.view, evidence=Evidence(1, {1: 0.4, 0: 0.2}, (folder / "confirmation.csv",)))
    tracker = MlflowTracker()
    tracker.mirror(study.view, study.trials)
    tracker.mirror(told, study.trials)
    after = snapshot(study)
    assert child(study, 1).data.metrics["objective_fresh"] == 0.4
    assert child(study, 0).data.metrics["objective_fresh"] == 0.2
    (parent,) = [run for run in runs(study) if "trial" not in run.data.tags]
    assert parent.data.tags["winner"] == "1"
    assert any(path.endswith("confirmation/confirmation.csv") for path in after["files"])
    MlflowTracker().mirror(told, study.trials)
    assert snapshot(study) == after
