import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator.mlflow_mirror import Mirror
from orchestrator.trackers.mlflow import MlflowTracker
from tests.orchestrator.mlflow_store import child, opened, runs
from tests.orchestrator.views import FakeStudy
from trainers.errors import TrackerError

CALLS = "create_run log_text log_batch log_artifact log_artifacts log_image set_terminated update_run".split()
NUM_CALLS = 17
"""What one finished trial of a new study costs."""


def interrupt_after(patch: pytest.MonkeyPatch, call: int) -> None:
    made = 0

    def counted(whole: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            result = whole(*args, **kwargs)
            made += 1
            if made == call:
                raise OSError("the power failed")
            return result

        return wrapper

    for name in CALLS:
        patch.setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))


@pytest.mark.parametrize("call", range(1, NUM_CALLS + 1))
def test_a_mirror_cut_short_after_any_call_is_completed_by_the_next(
    study: FakeStudy, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = study.start()
    study.train(run, 10)
    study.complete(run)
    with monkeypatch.context() as patch:
        interrupt_after(patch, call)
        with pytest.raises(TrackerError, match="the power failed"):
            MlflowTracker().mirror(study.view, study.trials)
    MlflowTracker().mirror(study.view, study.trials)
    found = child(study)
    assert found.info.status == "FINISHED"
    assert len(runs(study)) == 2
    assert len(opened(study).get_metric_history(found.info.run_id, "train/loss")) == 1
    thumbnails = [file for file in opened(study).list_artifacts(found.info.run_id, "images") if ".webp" in file.path]
    assert len(thumbnails) == 1
    assert found.data.tags["mlflow.loggedImages"] == "True"
    names = {file.path for file in opened(study).list_artifacts(found.info.run_id)}
    assert names == {"trial.yaml", "records.jsonl", "adapter", "images"}
    assert {"clip_t/clip-0123456789ab", "objective", "train/loss"} <= found.data.metrics.keys()
    assert found.data.params["train.kind"] == "sdxl_lora"
    (parent,) = [run for run in runs(study) if "trial" not in run.data.tags]
    assert parent.info.status == "FINISHED"
    assert [file.path for file in opened(study).list_artifacts(parent.info.run_id)] == ["study.yaml"]


def test_what_a_dead_server_missed_arrives_at_a_store_that_lives(study: FakeStudy) -> None:
    run = study.start()
    study.train(run, 10)
    dead = MlflowTracker(uri="http://127.0.0.1:9")
    with pytest.raises(TrackerError, match=r"http://127\.0\.0\.1:9: MLflow is behind"):
        dead.mirror(study.view, study.trials)
    study.train(run, 20)
    MlflowTracker().mirror(study.view, study.trials)
    assert len(opened(study).get_metric_history(child(study).info.run_id, "train/loss")) == 2


def test_a_failure_is_not_repeated_at_once(study: FakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study.start()
    attempts: list[str] = []

    def fail(*_: Any) -> None:
        attempts.append("made")
        raise OSError("disk full")

    monkeypatch.setattr(Mirror, "__init__", fail)
    monkeypatch.setattr("orchestrator.trackers.mlflow._PATIENCE", 1e9)
    tracker = MlflowTracker()
    for _ in range(3):
        with pytest.raises(TrackerError, match="disk full"):
            tracker.mirror(study.view, study.trials)
    assert attempts == ["made"]


def test_a_deleted_experiment_is_named_with_the_command_that_restores_it(study: FakeStudy) -> None:
    study.start()
    MlflowTracker().mirror(study.view, study.trials)
    client = opened(study)
    experiment = client.get_experiment_by_name("zog")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(TrackerError, match="mlflow experiments restore"):
        MlflowTracker().mirror(study.view, study.trials)


def test_a_trial_deleted_in_the_browser_comes_back_whole(study: FakeStudy) -> None:
    study.train(study.start(), 10)
    tracker = MlflowTracker()
    tracker.mirror(study.view, study.trials)
    opened(study).delete_run(child(study).info.run_id)
    study.train(study.trials[0].run, 20)
    with pytest.raises(TrackerError, match="active"):
        tracker.mirror(study.view, study.trials)
    MlflowTracker().mirror(study.view, study.trials)
    assert len(opened(study).get_metric_history(child(study).info.run_id, "train/loss")) == 2


@pytest.mark.slow
def test_two_studies_may_open_a_new_store_at_the_same_time(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.orchestrator.views import FakeStudy;"
        "from orchestrator.trackers.mlflow import MlflowTracker;"
        "study = FakeStudy(Path(sys.argv[1]), sys.argv[2]); study.start();"
        "MlflowTracker().mirror(study.view, study.trials)"
    )
    root = Path(__file__).parents[2]
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), name], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
        )
        for name in ("one", "two")
    ]
    assert [job.wait(120) for job in jobs] == [0, 0]
    assert sorted(e.name for e in MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_experiments()) == [
        "Default", "one", "two",
    ]  # fmt: skip
