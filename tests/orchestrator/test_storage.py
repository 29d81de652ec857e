import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from pydantic import ValidationError

from orchestrator.database import check_url, open_database
from orchestrator.ledger import read_trials
from orchestrator.spec import StudySpec, load_study
from orchestrator.storage import open_study
from orchestrator.trackers.mlflow import MlflowTracker
from tests.contracts.storage import ROOT, StorageContract, close, opened_elsewhere, wait_until_open
from tests.integration.crash import disk
from tests.integration.schedule import remount
from tests.orchestrator.postgresql import Server, running_server
from tests.orchestrator.studies import build_world, load
from tests.orchestrator.views import FakeStudy
from trainers.errors import ConfigError, StorageError


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


def called(words: list[str]) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, check=False, env=environment, capture_output=True, text=True)


class TestSqlite(StorageContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/a folder/shared.db"

    @pytest.fixture
    def other_url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/other.db"


class TestPostgresql(StorageContract):
    @pytest.fixture
    def url(self, server: Server) -> str:
        return server.new_database()

    @pytest.fixture
    def other_url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/other.db"

    def test_a_study_moves_here_from_its_own_file_by_one_command(self, tmp_path: Path, url: str):
        spec = load(tmp_path)
        study = open_study(spec)
        study.tell(study.ask(), 0.25)
        close(study)
        words = [sys.executable, "-m", "orchestrator", "move", str(tmp_path / "study.yaml"), "--to", url]
        told = called(words)
        assert told.returncode == 0, told.stderr
        assert f"storage: {url}" in told.stdout
        assert (spec.root / "study.db.moved").exists()
        assert not list(spec.root.glob("study.db-*"))
        again = open_study(load(tmp_path, f"storage={url}"))
        assert [trial.values for trial in again.trials] == [[0.25]]
        close(again)

    def test_a_study_that_another_process_holds_is_refused_and_its_holder_named(self, tmp_path: Path, spec: StudySpec):
        holder = opened_elsewhere(tmp_path, f"storage={spec.storage}")
        wait_until_open(holder)
        with pytest.raises(StorageError, match=f"process {holder.pid} on {socket.gethostname()} since 20"):
            open_study(spec)
        close(open_study(spec.model_copy(update={"name": "another"})))
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
        close(open_study(spec))

    def test_a_controller_that_lost_its_connection_must_get_hold_of_the_study_again(self, spec: StudySpec, url: str):
        study = open_study(spec)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND pid <> pg_backend_pid()"
            )
        other = open_study(spec)
        with pytest.raises(Exception, match=r"run by process|exception is raised"):
            study.ask()
        with pytest.raises(StorageError, match="run by process"):
            study.ask()
        close(other)
        assert study.ask().number == 0
        close(study)

    def test_a_wrong_password_is_refused_in_one_line_without_it(
        self, spec: StudySpec, monkeypatch: pytest.MonkeyPatch, server: Server
    ):
        monkeypatch.setenv("PGPASSWORD", "canary-7f3a")
        with pytest.raises(StorageError, match="password authentication failed") as refusal:
            open_study(spec)
        assert "canary-7f3a" not in str(refusal.value)
        assert "\n" not in str(refusal.value)

    def test_a_password_reaches_no_file_and_no_job(self, tmp_path: Path, server: Server, url: str):
        study_file = build_world(tmp_path)
        sets = [f"storage={url}", "launcher={kind: script, gpus: []}", "limits.trials=1", "sampler={kind: random}"]
        words = [sys.executable, "-m", "tests.integration.controller_process", "run", str(study_file)]
        words += [word for each in sets for word in ("--set", each)]
        told = called(words)
        assert told.returncode == 0, told.stderr
        assert server.password not in told.stdout + told.stderr
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert [path for path in files if server.password.encode() in path.read_bytes()] == []

    @pytest.mark.slow
    def test_mlflow_keeps_its_runs_here_too(self, tmp_path: Path, url: str):
        from mlflow import MlflowClient

        study = FakeStudy(tmp_path)
        run = study.start()
        study.train(run, 10)
        study.complete(run)
        MlflowTracker(uri=url).mirror(study.view, study.trials)
        client = MlflowClient(open_database(url).url)
        experiment = client.get_experiment_by_name("zog")
        assert experiment is not None
        assert len(client.search_runs([experiment.experiment_id])) == 2
        assert len(list((tmp_path / "mlartifacts" / "zog").rglob("trial.yaml"))) == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://me:canary-7f3a@host/db", "PGPASSWORD"),
        ("postgresql://host/db?user=me&password=canary-7f3a", "PGPASSWORD"),
        ("mysql://me:canary-7f3a@host/db", "PGPASSWORD"),
        ("sqlite:///study.db", "sqlite:////folder"),
        ("postgresql:/me:canary-7f3a@host/db", "expected sqlite"),
        ("mysql://me@host/db", "expected sqlite"),
        ("study.db", "expected sqlite"),
    ],
)
def test_a_database_s_address_is_checked_when_the_study_is_read(tmp_path: Path, url: str, message: str):
    load(tmp_path)
    with pytest.raises(ConfigError, match=message) as refusal:
        load_study(tmp_path / "study.yaml", [f"storage={url}"])
    assert "canary-7f3a" not in str(refusal.value)
    with pytest.raises(ValidationError, match=message):
        MlflowTracker(uri=url)


def test_a_finished_study_is_read_where_nothing_can_be_written(tmp_path: Path):
    with disk(tmp_path / "study") as is_mounted:
        if not is_mounted:
            pytest.skip("no disk can be mounted here; run as root")
        spec = load(tmp_path / "study")
        study = open_study(spec)
        study.tell(study.ask(), 0.25)
        close(study)
        remount(tmp_path / "study", "ro")
        assert [view.values for view in read_trials(spec)] == [[0.25]]


@pytest.mark.parametrize("name", ["what?", "20%20", "a#b", "猫 ü"])
def test_a_folder_of_any_name_holds_its_study(tmp_path: Path, name: str):
    folder = tmp_path / name
    folder.mkdir()
    spec = load(folder)
    study = open_study(spec)
    study.tell(study.ask(), 0.25)
    close(study)
    assert [view.values for view in read_trials(spec)] == [[0.25]]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_server_that_does_not_answer_is_named(tmp_path: Path):
    with pytest.raises(StorageError, match=r"postgresql://127\.0\.0\.1:9/db: got .*refused"):
        open_study(load(tmp_path, "storage=postgresql://me@127.0.0.1:9/db"))


def test_an_address_with_a_driver_is_the_same_database():
    assert check_url("postgresql+psycopg://me@host/db")
    assert open_database("postgresql+psycopg://me@host/db").url == open_database("postgresql://me@host/db").url
