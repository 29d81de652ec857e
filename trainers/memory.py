"""How much memory training takes, and what makes room for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from trainers.method import Method


def peak_bytes(device: torch.device) -> int:
    """Largest memory use so far: device memory on CUDA, this process's resident memory elsewhere."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    # Kibibytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def make_room(method: Method) -> None:
    """Let what training steps do not call upon wait in host memory, until pictures are drawn."""
    method.backbone.rest([trained.network for trained in method.trained().values()])
