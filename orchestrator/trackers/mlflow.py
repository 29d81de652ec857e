"""MLflow (Zaharia et al., 2018): curves, scores, pictures and adapters of all studies, side by side in a browser."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import quote, urlencode

from pydantic import AfterValidator, PrivateAttr
from typing_extensions import override

from orchestrator.database import SqliteDatabase, check_url, open_database, sqlite_url
from orchestrator.server import HOST, choose_port, running
from orchestrator.tracker import StudyView, Tracker, TrialView
from trainers.errors import ConfigError, TrackerError

if TYPE_CHECKING:
    from orchestrator.mlflow_mirror import Mirror

_PATIENCE = 10.0
"""A failed update is repeated after this many times what it cost, so that a dead server cannot slow a study."""
_LONGEST_PATIENCE_SECONDS = 60.0


def _is_store(uri: str) -> str:
    if not uri.startswith(("http://", "https://")):
        return check_url(uri)
    if "@" in uri:
        raise ValueError(
            "got a user name in the address; expected it in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "because a study file is copied into every store"
        )
    return uri


class MlflowTracker(Tracker):
    """Mirrors the study to MLflow."""

    kind: Literal["mlflow"] = "mlflow"
    uri: Annotated[str, AfterValidator(_is_store)] | None = None
    """`sqlite:////folder/mlflow.db`, `postgresql://user@host/database` or `http://host:port`; null is `mlflow.db`
    beside the study's folder. Pictures and adapters go to `mlartifacts` beside the study's folder, or to the server."""

    _mirror: "Mirror | None" = PrivateAttr(default=None)
    _failure: str = PrivateAttr(default="")
    _retry_at: float = PrivateAttr(default=0.0)

    @override
    def mirror(self, study: StudyView, trials: Sequence[TrialView]) -> None:
        started = [trial for trial in trials if trial.start is not None]
        if not started:
            return
        begin = time.monotonic()
        if begin < self._retry_at:
            raise TrackerError(self._failure)
        from orchestrator.mlflow_mirror import Mirror, store_errors

        try:
            if self._mirror is None:
                self._mirror = Mirror(self._store(study.root), study, started, self._artifacts(study.root))
            self._mirror.update(started)
            if study.evidence:
                self._mirror.send_evidence(study.evidence)
        except (TrackerError, *store_errors()) as error:
            end = time.monotonic()
            self._mirror = None
            self._failure = f"{self._store(study.root)}: MLflow is behind and will catch up ({_first_line(error)})"
            self._retry_at = end + min(_PATIENCE * (end - begin), _LONGEST_PATIENCE_SECONDS)
            raise TrackerError(self._failure) from error

    @override
    def serve(self, name: str, root: Path, port: int, say: Callable[[str], None]) -> None:
        from orchestrator.mlflow_mirror import find_experiment, store_errors

        if not root.is_dir():
            raise ConfigError(f"{root}: got no study {name!r}; expected one that has begun; run it first")
        store = self._store(root)
        try:
            experiment = find_experiment(store, name, self._artifacts(root))
        except store_errors() as error:
            raise TrackerError(f"{store}: cannot be opened ({_first_line(error)})") from error
        pages = f"/#/experiments/{experiment}/runs?{urlencode(_BEST_FIRST, quote_via=quote)}"
        if _is_server(store):
            say(f"This study's pages: {store.rstrip('/')}{pages}")
            return
        chosen = choose_port(port)
        if port not in (0, chosen):
            say(f"Port {port} is taken; using {chosen}.")
        address = f"http://{HOST}:{chosen}"
        say("Starting the MLflow server …")
        server = _server(store, self._artifacts(root), chosen)
        with running(server, _SERVER_ENVIRONMENT, f"{address}/health") as process:
            say(f"This study's pages: {address}{pages}\nCtrl-C ends the server.")
            process.wait()

    def _store(self, root: Path) -> str:
        uri = self.uri or sqlite_url(root.parent.resolve() / "mlflow.db")
        return uri if _is_server(uri) else open_database(uri).url

    def _artifacts(self, root: Path) -> Path | None:
        """Where pictures and adapters go; None is where the server keeps them."""
        store = self._store(root)
        if _is_server(store):
            return None
        database = open_database(store)
        beside = database.path if isinstance(database, SqliteDatabase) else root.resolve()
        return beside.parent / "mlartifacts"


def _is_server(store: str) -> bool:
    return store.startswith("http")


_BEST_FIRST = {
    "searchFilter": "tags.trial LIKE '%'",
    "orderByKey": "metrics.`objective`",
    "orderByAsc": "false",
    "compareRunsMode": "CHART",
}
"""A view with charts of all trials; sorted by time, MLflow would fold them under their parent and chart none."""

_SERVER_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
"""Without the second line the server starts eight more processes."""


def _server(store: str, artifacts: Path | None, port: int) -> list[str]:
    assert artifacts is not None
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level warning"]
    return [*command, "--default-artifact-root", artifacts.as_uri(), "--host", HOST, "--port", str(port)]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
