"""A study next to an MLflow store that is ready to use, and a cluster in memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.orchestrator.cluster import Cluster, registered_cluster
from tests.orchestrator.views import FakeStudy


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated data base, made once: the migrations take longer than all tests that use it."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def study(tmp_path: Path, empty_store: Path) -> FakeStudy:
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    return FakeStudy(tmp_path)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with registered_cluster() as cluster:
        yield cluster
