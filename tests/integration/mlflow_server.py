"""MLflow's own server, to be killed and started again."""

# pyright: basic

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from orchestrator.trackers.mlflow import _SERVER_ENVIRONMENT

PATIENCE_SECONDS = 400


class Server:
    """MLflow's own server over a file, that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "mlflow.db"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri, self.process = f"http://127.0.0.1:{self.port}", None
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.store}"]
        command += ["--port", str(self.port), "--workers", "1"]
        environment = {**os.environ, **_SERVER_ENVIRONMENT}
        with (self.store.with_suffix(".txt")).open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.answers():
            assert time.monotonic() < deadline, self.store.with_suffix(".txt").read_text()[-2000:]
            time.sleep(0.5)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        assert self.process
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None
