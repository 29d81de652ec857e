"""What an MLflow store holds of a study."""

from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from tests.orchestrator.views import FakeStudy


def opened(study: FakeStudy) -> MlflowClient:
    return MlflowClient(f"sqlite:///{study.output / 'mlflow.db'}")


def runs(study: FakeStudy) -> list[Run]:
    client = opened(study)
    experiment = client.get_experiment_by_name(study.name)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def child(study: FakeStudy, number: int = 0) -> Run:
    (found,) = [run for run in runs(study) if run.data.tags.get("trial") == str(number)]
    return found


def snapshot(study: FakeStudy) -> dict[str, Any]:
    """Everything that the store holds of the study, artifacts included."""
    held: dict[str, Any] = {}
    for run in runs(study):
        history = {
            key: [
                (point.step, point.timestamp, point.value)
                for point in opened(study).get_metric_history(run.info.run_id, key)
            ]
            for key in run.data.metrics
        }
        held[run.info.run_id] = (run.data.params, run.data.tags, history, run.info.status, run.info.end_time)
    files = sorted(str(path) for path in (study.output / "mlartifacts").rglob("*"))
    return {"runs": held, "files": files}
