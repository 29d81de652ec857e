"""Ranks that add up who they are: torch's process group as a trial's would be, and nothing else."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from orchestrator.ranks import name_ranks

if __name__ == "__main__":
    name_ranks(os.environ)
    dist.init_process_group("gloo")
    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    answer = f"{dist.get_world_size()} ranks, sum {int(total)}"
    (Path(sys.argv[1]) / f"rank{dist.get_rank()}.txt").write_text(answer)
    dist.destroy_process_group()
