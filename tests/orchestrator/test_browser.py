"""The real MLflow server over HTTP, and its pages in a real browser."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.trackers.mlflow import MlflowTracker
from tests.orchestrator.views import FakeStudy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SERVE = (
    "import sys; from pathlib import Path; from orchestrator.trackers.mlflow import MlflowTracker;"
    "MlflowTracker().serve('zog', Path(sys.argv[1]) / 'zog', 0, lambda line: print(line, flush=True))"
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> FakeStudy:
    study = FakeStudy(tmp_path_factory.mktemp("runs"))
    for value in (0.2, 0.4, 0.3):
        run = study.start()
        for step in (10, 20, 30):
            study.train(run, step)
        study.complete(run, value)
    MlflowTracker().mirror(study.view, study.trials)
    return study


@pytest.fixture(scope="module")
def address(study: FakeStudy) -> Iterator[str]:
    """Pages of the study; the server is started as the command line does, and ended as `kill` does."""
    command = [sys.executable, "-c", SERVE, str(study.output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, cwd=study.output, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            # The address is the last line that we need; reading on would block.
            yield next(found[0] for line in server.stdout if (found := re.findall(r"http://\S+", line)))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)


@pytest.fixture(scope="module")
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no browser: install the Debian package 'chromium'")


def page(chromium: str, address: str, profile: Path) -> str:
    """The document after its scripts ran for a minute of the page's own time."""
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1500,4300",
        f"--user-data-dir={profile}",
    ]
    command = [chromium, *options, "--timeout=120000", "--virtual-time-budget=60000", "--dump-dom", address]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout


def children(study: FakeStudy) -> list[str]:
    client = MlflowClient(f"sqlite:///{study.output / 'mlflow.db'}")
    runs = client.search_runs(["1"], "tags.trial LIKE '%'", order_by=["attributes.start_time"])
    return [run.info.run_id for run in runs]


def test_the_server_answers_with_the_study_s_trials(study: FakeStudy, address: str) -> None:
    body = json.dumps({"experiment_ids": ["1"], "filter": "tags.trial LIKE '%'"}).encode()
    server = address.partition("/#/")[0]
    request = urllib.request.Request(f"{server}/api/2.0/mlflow/runs/search", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        names = {run["info"]["run_name"] for run in json.load(answer)["runs"]}
    assert names == {"trial-0000", "trial-0001", "trial-0002"}


def test_a_study_is_mirrored_through_a_server_as_well(address: str, tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, "remote")
    run = study.start(prompt="猫")
    study.train(run, 10)
    study.train(run, 20, loss=float("nan"))
    study.complete(run, 0.3, clip_t=float("nan"))
    server = address.partition("/#/")[0]
    MlflowTracker(uri=server).mirror(study.view, study.trials)
    MlflowTracker(uri=server).mirror(study.view, study.trials)
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("remote")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], "tags.trial LIKE '%'")
    assert found.info.status == "FINISHED"
    assert found.data.params["train.prompt"] == "猫"
    assert found.data.metrics["objective"] == 0.3
    assert len(client.get_metric_history(found.info.run_id, "train/loss")) == 2
    names = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert names == {"trial.yaml", "records.jsonl", "adapter", "images"}


def test_the_study_s_page_charts_every_trial_with_its_pictures(address: str, chromium: str, tmp_path: Path) -> None:
    shown = page(chromium, address, tmp_path)
    for text in ("trial-0000", "trial-0001", "trial-0002", "train/loss", "clip_t/clip-0123456789ab", "samples"):
        assert text in shown
    assert "get-artifact?path=images" in shown


def test_the_compare_page_draws_parallel_coordinates(
    study: FakeStudy, address: str, chromium: str, tmp_path: Path
) -> None:
    query = urllib.parse.urlencode({"runs": json.dumps(children(study)), "experiments": '["1"]'})
    server = address.partition("/#/")[0]
    shown = page(chromium, f"{server}/#/compare-runs?{query}", tmp_path)
    assert "Comparing 3 Runs from 1 Experiment" in shown
    assert "parcoords" in shown
    assert "train.optimizer.lr" in shown
