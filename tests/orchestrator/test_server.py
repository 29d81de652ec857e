import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from orchestrator.__main__ import main
from orchestrator.server import HOST, choose_port, running
from orchestrator.trackers.mlflow import MlflowTracker
from orchestrator.trackers.none import NoTracker
from tests.contracts.launcher import wait_for
from trainers.errors import ConfigError, TrackerError

SERVE = [sys.executable, "-m", "http.server", "--bind", HOST]


@pytest.fixture
def port() -> int:
    return choose_port(0)


def test_a_free_port_is_taken_as_it_is(port: int) -> None:
    assert choose_port(port) == port


def test_another_port_is_chosen_when_something_listens_on_the_wanted_one() -> None:
    with closing(socket.create_server((HOST, 0))) as taken:
        wanted = taken.getsockname()[1]
        assert choose_port(wanted) != wanted


def test_a_server_is_healthy_inside_the_block_and_gone_after_it(port: int, tmp_path: Path) -> None:
    with running([*SERVE, "--directory", str(tmp_path), str(port)], {}, f"http://{HOST}:{port}/") as process:
        assert process.poll() is None
    assert process.poll() is not None
    assert choose_port(port) == port


def test_a_server_that_ends_at_once_is_an_error_that_says_so(port: int) -> None:
    with (
        pytest.raises(TrackerError, match="ended with code 3"),
        running([sys.executable, "-c", "raise SystemExit(3)"], {}, f"http://{HOST}:{port}/"),
    ):
        pass


def test_sigterm_ends_the_block_as_ctrl_c_does(port: int, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    serving = running([*SERVE, "--directory", str(tmp_path), str(port)], {}, f"http://{HOST}:{port}/")
    with serving, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert choose_port(port) == port
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_server_ends_with_a_process_that_is_killed(port: int) -> None:
    serve = f"with running({[*SERVE, str(port)]}, {{}}, 'http://{HOST}:{port}/'): input()"
    words = [sys.executable, "-c", f"from orchestrator.server import running\n{serve}"]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as owner:
        wait_for(lambda: choose_port(port) != port)
        owner.kill()
    wait_for(lambda: choose_port(port) == port)


def test_a_study_without_a_tracker_has_no_pages(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has kind 'none'"):
        NoTracker().serve("zog", tmp_path, 5000, print)


def test_a_store_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    store = tmp_path / "mlflow.db"
    store.write_bytes(b"this is not a data base, however long one looks at it" * 100)
    with pytest.raises(TrackerError, match=r"mlflow\.db: cannot be opened"):
        MlflowTracker(uri=f"sqlite:///{store}").serve("zog", tmp_path, 5000, print)


def test_pages_of_a_server_that_already_runs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("orchestrator.mlflow_mirror.find_experiment", lambda store, name, artifacts: "7")
    MlflowTracker(uri="http://tracking.example/").serve("zog", tmp_path, 5000, said.append)
    assert said[0].startswith("This study's pages: http://tracking.example/#/experiments/7/runs?")


@pytest.mark.parametrize("port", ["99999", "-1", "http"])
def test_a_port_that_does_not_exist_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ui", "study.yaml", "--port", port])
    assert f"argument --port: got {port!r}; expected a whole number from 0 to 65535" in capsys.readouterr().err


def test_a_study_that_never_ran_has_no_pages(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one that has begun"):
        MlflowTracker().serve("zog", tmp_path / "zog", 5000, print)
