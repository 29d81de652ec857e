"""What MLflow holds of one study, and what it still lacks.

Everything that was sent is read back from the store when a mirror is made: the parent run is known by the study's name
and the time of its first trial, a child run by its parent and its number. How far a trial's events were sent stands in
the tag `events`, which goes out after the metrics it speaks of; metrics carry the job's own time, so sending one twice
changes nothing.
"""

import importlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from orchestrator.database import open_database
from orchestrator.failures import failure_file, read_failure
from orchestrator.front import front
from orchestrator.progress import Picture, Progress, outcome, plain, read_news
from orchestrator.tracker import Evidence, StudyView, TrialView
from trainers.errors import StorageError, TrackerError
from trainers.rundir import RunDir, recorded_hash, thaw

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

T = TypeVar("T")

_MAX_KEY = 250
_MAX_PARAM = 6000
_MAX_TAG = 8000
_MAX_PARAMS = 100
_MAX_METRICS = 900
"""Limits of one `log_batch` request; 1000 things in all."""

_STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
"""Optuna's final states in MLflow's words."""

IMAGE_KEY = "samples"
"""The same in every child run, so that the image grid shows trials side by side."""


def store_errors() -> tuple[type[Exception], ...]:
    """What a store raises when it cannot be reached or refuses an update."""
    _configure()
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, CommandError, StorageError, OSError)


def find_experiment(store: str, name: str, artifacts: Path | None) -> str:
    """Id of the study's experiment, which is made if it is missing.

    Raises:
        TrackerError: It was deleted in the browser.
    """
    return _find_experiment(_open(store), store, name, artifacts)


@dataclass
class _Child:
    """A trial's run as the store has it."""

    run_id: str
    tags: dict[str, str]
    ended: bool
    pictures: set[str] | None = None
    """Those that the store had when the first was to be sent; None if it was not asked."""

    def end(self) -> None:
        """Nothing more is sent that depends on what was: thousands of ended trials are kept in mind."""
        self.ended, self.tags, self.pictures = True, {}, None

    @property
    def sent(self) -> Progress:
        """Up to where the job's events were sent."""
        return Progress.parse(self.tags.get("events", ""))


class Mirror:
    """One study in one store."""

    def __init__(
        self, store: str, study: StudyView, trials: Sequence[TrialView], artifacts: Path | None = None
    ) -> None:
        self._study = study
        self._client = _open(store)
        self._experiment = _find_experiment(self._client, store, study.name, artifacts)
        self._parent = self._find_parent(trials)
        runs = self._search(f"tags.`mlflow.parentRunId` = '{self._parent.run_id}'")
        self._children = {int(run.data.tags["trial"]): _child(run) for run in runs}
        for child in self._children.values():
            if child.ended:
                child.end()
        self._num_ended = -1

    def update(self, trials: Sequence[TrialView]) -> None:
        """Send what the store lacks; asks nothing of the store if it lacks nothing."""
        for trial in trials:
            child = self._children.get(trial.number)
            if child is None:
                child = self._children[trial.number] = self._create(trial)
            if not child.ended:
                self._update_trial(child, trial)
        if self._num_ended != (num_ended := sum(child.ended for child in self._children.values())):
            self._num_ended = num_ended
            self._send(self._parent, tags={"front": ", ".join(str(trial.number) for trial in front(trials))})
        ended = all(trial.state in _STATUS for trial in trials)
        if ended != self._parent.ended:
            self._client.update_run(self._parent.run_id, status="FINISHED" if ended else "RUNNING")
            self._parent.ended = ended

    def send_evidence(self, evidence: Evidence) -> None:
        """Send what fresh seeds said: `objective_fresh` to the best trials, files and the winner to the study."""
        folder, written = evidence.files[0].parent.name, int(evidence.files[0].stat().st_mtime * 1000)
        if self._parent.tags.get("confirmed") == folder:
            return
        for number, value in evidence.values.items():
            self._send(self._children[number], metrics=[_metric("objective_fresh", value, written)])
        for file in evidence.files:
            self._client.log_artifact(self._parent.run_id, str(file), "confirmation")
        self._send(self._parent, tags={"winner": str(evidence.winner), "confirmed": folder})

    def _update_trial(self, child: _Child, trial: TrialView) -> None:
        if "trial_sha256" not in child.tags and trial.run.trial.exists():
            self._send_config(child, trial.run)
        self._send_events(child, trial.run)
        if trial.state in _STATUS:
            self._send_outcome(child, trial)
            end = trial.end or trial.start
            self._client.set_terminated(child.run_id, _STATUS[trial.state], end_time=_milliseconds(end))
            child.end()
        else:
            self._send(child, tags={"state": trial.state, "reason": trial.reason or ""})

    def _send_config(self, child: _Child, run: RunDir) -> None:
        config = thaw(run.trial)
        self._client.log_artifact(child.run_id, str(run.trial))
        self._send(child, params=flatten(config), tags={"trial_sha256": recorded_hash(run.trial)})

    def _send_events(self, child: _Child, run: RunDir) -> None:
        news = read_news(run, child.sent)
        if news.progress == child.sent:
            return
        for picture in news.pictures:
            self._send_image(child, picture)
        metrics = [_metric(point.name, point.value, int(point.time * 1000), point.step) for point in news.points]
        self._send(child, metrics=metrics, tags={"events": str(news.progress)})

    def _send_outcome(self, child: _Child, trial: TrialView) -> None:
        tags = {"state": trial.state, "reason": trial.reason or ""}
        ended = _milliseconds(trial.end or trial.start)
        metrics = [_metric(name, value, ended) for name, value in outcome(self._study, trial).items()]
        if result := trial.run.read_result():
            tags |= {f"version.{package}": version for package, version in result.versions.items()}
            self._send_files(child, trial.run)
        if failure := read_failure(trial.run):
            tags |= {"last_step": str(failure.step), "jobs_lost": str(failure.jobs_lost)}
            if failure.peak_bytes is not None:
                metrics.append(_metric("peak_bytes", failure.peak_bytes, ended))
            self._client.log_artifact(child.run_id, str(failure_file(trial.run)))
        self._send(child, metrics=metrics, tags=tags)

    def _send_files(self, child: _Child, run: RunDir) -> None:
        if run.adapter.is_dir():
            self._client.log_artifacts(child.run_id, str(run.adapter), "adapter")
        if run.records.is_file():
            self._client.log_artifact(child.run_id, str(run.records))
        if (run.samples / "grid.png").is_file():
            self._send_image(child, Picture(IMAGE_KEY, run.samples / "grid.png", 0, run.result.stat().st_mtime))

    def _send_image(self, child: _Child, picture: Picture) -> None:
        """Log a picture once: each call makes new files, so ask whether an interrupted update made them."""
        if child.pictures is None:
            child.pictures = {file.path for file in self._client.list_artifacts(child.run_id, "images")}
        name = f"images/{picture.name.replace('/', '~')}+step+{picture.step}+"
        if not any(path.startswith(name) and path.endswith(".webp") for path in child.pictures):  # written last
            from PIL import Image

            with Image.open(picture.path) as image:
                moment = int(picture.time * 1000)
                self._client.log_image(child.run_id, image, key=picture.name, step=picture.step, timestamp=moment)
        self._send(child, tags={"mlflow.loggedImages": "True"})  # else the page shows none

    def _find_parent(self, trials: Sequence[TrialView]) -> _Child:
        first = min(trials, key=lambda trial: trial.number).start
        assert first is not None
        started = first.replace(tzinfo=None).isoformat()  # UTC, as the database has it
        found = self._search(f"tags.study = '{self._study.name}' and tags.started = '{started}'")
        if found:
            parent = _child(found[0])
        else:
            tags = {"study": self._study.name, "started": started}
            parent = _child(self._client.create_run(self._experiment, _milliseconds(first), tags, self._study.name))
        note = f"```yaml\n{self._study.study_yaml}\n```"[:_MAX_TAG]
        if parent.tags.get("mlflow.note.content") != note:
            self._client.log_text(parent.run_id, self._study.study_yaml, "study.yaml")
        self._send(parent, tags={**self._tags(), "mlflow.note.content": note})
        return parent

    def _create(self, trial: TrialView) -> _Child:
        tags = {
            "study": self._study.name,
            "trial": str(trial.number),
            "state": trial.state,
            "mlflow.parentRunId": self._parent.run_id,
            **self._tags(),
        }
        start, name = _milliseconds(trial.start), f"trial-{trial.number:04d}"
        return _child(self._client.create_run(self._experiment, start, tags, name))

    def _tags(self) -> dict[str, str]:
        commit = self._study.tags.get("version.commit", "").partition("+")[0]
        return {**self._study.tags, **({"mlflow.source.git.commit": commit} if commit else {})}

    def _send(
        self,
        child: _Child,
        *,
        metrics: Sequence["Metric"] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Send numbers, then parameters, then the tags that say so; nothing if there is nothing new."""
        from mlflow.entities import Param, RunTag

        cut = {key: value[:_MAX_TAG] for key, value in (tags or {}).items()}
        changed = {key: value for key, value in cut.items() if child.tags.get(key, "") != value}
        for batch in _batches(list((params or {}).items()), _MAX_PARAMS):
            self._client.log_batch(child.run_id, params=[Param(key, value) for key, value in batch])
        *earlier, last = list(_batches(metrics, _MAX_METRICS)) or [[]]
        for batch in earlier:
            self._client.log_batch(child.run_id, metrics=batch)
        if last or changed:
            run_tags = [RunTag(key, value) for key, value in changed.items()]
            self._client.log_batch(child.run_id, metrics=last, tags=run_tags)
            child.tags.update(changed)

    def _search(self, query: str) -> "list[Run]":
        runs: list[Run] = []
        token: str | None = None
        while True:
            page = self._client.search_runs([self._experiment], query, page_token=token)
            runs += page
            token = cast("str | None", page.token)
            if not token:
                return runs


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Leaves of a config by dotted path, as MLflow's parameters can hold them."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        path = f"{prefix}{plain(key)}"
        if isinstance(value, dict):
            flat |= flatten(cast("dict[str, Any]", value), f"{path}.")
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        end = " … (all of it is in trial.yaml)"
        flat[path[:_MAX_KEY]] = text if len(text) <= _MAX_PARAM else text[: _MAX_PARAM - len(end)] + end
    return flat


def _metric(name: str, value: float, milliseconds: int, step: int = 0) -> "Metric":
    from mlflow.entities import Metric

    return Metric(name, float(value), milliseconds, step)


def _child(run: "Run") -> _Child:
    return _Child(run.info.run_id, dict(run.data.tags), run.info.status != "RUNNING")


def _milliseconds(moment: datetime | None) -> int:
    assert moment is not None
    return int(moment.timestamp() * 1000)


def _batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _configure() -> None:
    """MLflow is configured by environment variables only; a user's own values are kept."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    importlib.import_module("mlflow")  # which sets its own level
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _open(store: str) -> "MlflowClient":
    _configure()
    from mlflow import MlflowClient

    # Its first opening makes the tables, which two processes cannot do at once.
    with nullcontext() if store.startswith("http") else open_database(store).alone():
        client = MlflowClient(tracking_uri=store)
        client.search_experiments(max_results=1)
    return client


def _find_experiment(client: "MlflowClient", store: str, name: str, artifacts: Path | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        location = (artifacts / name).as_uri() if artifacts else None
        return client.create_experiment(name, location, tags={"mlflow.experimentKind": "custom_model_development"})
    if found.lifecycle_stage != "active":
        raise TrackerError(
            f"{store}: experiment {name!r} was deleted; expected an active one; run "
            f"`MLFLOW_TRACKING_URI={store} mlflow experiments restore -x {found.experiment_id}`, or rename the study"
        )
    return found.experiment_id
