"""A real Ray cluster of two nodes on this machine, in a process and a folder of its own."""

# pyright: basic

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
START_TIMEOUT_SECONDS = 20
"""After which Ray gives up a job that found no room; its default is 15 minutes."""


@contextmanager
def running_cluster(nodes: int = 2) -> Generator[str]:
    """Its dashboard's address; skips where Ray is not installed."""
    if find_spec("ray") is None or find_spec("aiohttp_cors") is None:
        pytest.skip("needs Ray: pip install 'ray[default]'")
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: it holds sockets
    (folder / "ray").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_JOB_START_TIMEOUT_SECONDS": str(START_TIMEOUT_SECONDS),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # else jobs get what a busy machine leaves over, at 15
        "RAY_TMPDIR": str(folder),
    }
    words = [sys.executable, "-m", "tests.orchestrator.ray_cluster", str(folder), str(nodes)]
    with (folder / "said.txt").open("wb") as said:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
        )
    try:
        assert process.stdout
        address = next((line for line in iter(process.stdout.readline, "") if line.startswith("http")), None)
        assert address, (folder / "said.txt").read_text()[-3000:]
        yield address.strip()
    finally:
        with suppress(subprocess.TimeoutExpired):
            process.communicate("", timeout=60)
        for left in processes(folder):
            with suppress(psutil.NoSuchProcess):
                left.kill()
        shutil.rmtree(folder, ignore_errors=True)


def processes(folder: Path) -> list[psutil.Process]:
    """What names the folder on its command line, or was started by such a process."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(folder) in word for word in process.cmdline()):
                found.append(process)
    return found


def main() -> None:
    """Start the nodes, say where, and stop them when standard input ends."""
    folder, nodes = Path(sys.argv[1]), int(sys.argv[2])
    from ray.cluster_utils import Cluster

    small: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
    head = {
        **small,
        "include_dashboard": True,
        "dashboard_port": 0,
        "temp_dir": str(folder / "ray"),
        "resources": {"head": 1},
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(nodes - 1):
        cluster.add_node(**small)
    cluster.wait_for_nodes()
    print(f"http://{cluster.webui_url}", flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
