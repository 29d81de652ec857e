"""Ranks that `srun` started without torchrun: the same facts in torch's words."""

import re
from collections.abc import MutableMapping

_FIRST_PORT = 20_000
_NUM_PORTS = 10_000
"""Below Linux's range of ports that it gives out itself (32768 and up)."""


def name_ranks(environment: MutableMapping[str, str]) -> None:
    """Add torch's variables (RANK, WORLD_SIZE, MASTER_ADDR …) to those of a Slurm step's task.

    Nothing changes if they are there, because torchrun started this process, or outside of a step.
    """
    if "RANK" in environment or "SLURM_STEP_ID" not in environment:
        return
    number = int(environment["SLURM_JOB_ID"]) * 16 + int(environment["SLURM_STEP_ID"])  # steps side by side differ
    environment.update(
        RANK=environment["SLURM_PROCID"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
        WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"],
        MASTER_ADDR=environment.get("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"])),
        MASTER_PORT=str(_FIRST_PORT + number % _NUM_PORTS),
    )


def first_host(nodes: str) -> str:
    """The first machine of Slurm's list, as in `gpu[08-11,40],login1`."""
    head = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    assert head is not None, nodes
    stem, number, rest = head.groups(default="")
    return f"{stem}{number}{rest}"
