"""A trial on several nodes of a Ray cluster: a job that asks for them and keeps one torchrun on each, side by side.

All of torchrun's agents end with the first that fails, with this process, and with the cluster's own processes on their
nodes.
"""

import argparse
import ctypes
import json
import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.launcher import rendezvous

_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""
_LOOK_SECONDS = 0.2
_PATIENCE_SECONDS = 8.0
"""For agents to end their ranks; whoever stops the job kills after 10 s."""
_LIBC = ctypes.CDLL(None)
_ray: Any = ray
"""Ray's functions are typed only in part."""
_split: Callable[..., tuple[list[Any], list[Any]]] = _ray.wait
_answers: Callable[..., list[Any]] = _ray.get


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun on every node; 0 if all of them say so."""
    parser = argparse.ArgumentParser(prog="orchestrator.ray_nodes", description=__doc__)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--needs", type=json.loads, required=True, help="what to set aside on each, by Ray's names")
    parser.add_argument("--placed", type=Path, required=True, help="file for the nodes' addresses, once they are known")
    parser.add_argument("torchrun", nargs="+", help="its options, module and arguments")
    options = parser.parse_args(argv)
    ray.init(logging_level=logging.ERROR, log_to_driver=False)
    signal.signal(signal.SIGTERM, _leave)
    group = placement_group([options.needs] * options.nodes, strategy="STRICT_SPREAD")
    _wait([group.ready()])
    found = _wait([_on(group, index, options.needs, _address).remote() for index in range(options.nodes)])
    addresses, ports = zip(*found, strict=True)
    options.placed.parent.mkdir(exist_ok=True)
    options.placed.write_text("".join(f"{address}\n" for address in addresses), encoding="utf-8")
    agents: list[Any] = []
    for index, address in enumerate(addresses):
        meeting = rendezvous(options.nodes, index, f"{addresses[0]}:{ports[0]}")
        words = [sys.executable, "-m", "torch.distributed.run", *meeting, "--local-addr", address, *options.torchrun]
        log = Path("log.txt" if index == 0 else f"logs/node{index}.txt").absolute()
        agents.append(_on(group, index, options.needs, _keep).remote(words, str(log)))
    return _watch(agents)


def _on(group: PlacementGroup, index: int, needs: dict[str, float], function: Any) -> Any:
    others = {name: need for name, need in needs.items() if name not in {"CPU", "GPU"}}
    place = PlacementGroupSchedulingStrategy(group, index)
    return _ray.remote(function).options(
        num_cpus=needs.get("CPU", 0),
        num_gpus=needs.get("GPU", 0),
        resources=others,
        scheduling_strategy=place,
        max_retries=0,  # a part of a trial is nothing: all of it is submitted again
    )


def _leave(_signal: int, _frame: object) -> None:
    sys.exit(1)


def _wait(asked: list[Any]) -> list[Any]:
    """Answers, however long they take; a signal is heeded meanwhile."""
    while _split(asked, num_returns=len(asked), timeout=1)[1]:
        pass
    return _answers(asked)


def _watch(agents: list[Any]) -> int:
    """Until all agents have ended well, one has not, or this process is told to end."""
    left = agents
    try:
        while left:
            ended, left = _split(left, timeout=1)
            if any(code != 0 for code in _answers(ended)):
                return 1
        return 0
    finally:
        for agent in left:
            ray.cancel(agent)
        if left:
            _split(left, num_returns=len(left), timeout=_PATIENCE_SECONDS)


def _address() -> tuple[str, int]:
    """Of this node, and a port that is free on it."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(_ray.util.get_node_ip_address()), probe.getsockname()[1]


def _keep(words: list[str], log: str) -> int:
    """Exit code of torchrun, in a task; cancelling the task interrupts it, which ends torchrun."""
    Path(log).parent.mkdir(exist_ok=True)
    with Path(log).open("ab") as file:
        agent = subprocess.Popen(words, cwd=Path(log).parent, stdout=file, stderr=file, preexec_fn=_end_with_parent)  # noqa: S603, PLW1509
        try:
            while agent.poll() is None:
                time.sleep(_LOOK_SECONDS)  # a wait for the process itself could not be interrupted
        finally:
            agent.terminate()
            agent.wait()
    return agent.returncode


def _end_with_parent() -> None:
    """Have the kernel end torchrun when Ray's worker is gone, which Ray kills when a job is."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


if __name__ == "__main__":
    from orchestrator.ray_nodes import main as importable  # Ray's workers import what they run

    sys.exit(importable())
