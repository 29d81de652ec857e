"""Files that let training go on where it stopped."""

import hashlib
import io
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from trainers.errors import CheckpointError

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)\.pt")
_DIGEST_BYTES = hashlib.sha256().digest_size


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> None:
    """Write `state` as of after `step` optimizer steps, atomically, then remove all but the newest `keep` files.

    The file is the sha256 of what follows, and what `torch.save` makes. A full disk leaves the older files alone.
    """
    buffer = io.BytesIO()
    torch.save({"step": step, **state}, buffer)
    content = buffer.getbuffer()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".step.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(hashlib.sha256(content).digest())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / f"step-{step:07d}.pt")
    finally:
        temporary.unlink(missing_ok=True)
    for _, path in _list(folder)[keep:]:
        path.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest state that is intact, or None if none was ever written; tensors are on the CPU.

    Raises:
        CheckpointError: There are files and none is intact.
    """
    found = _list(folder)
    for step, path in found:
        content = path.read_bytes()
        if hashlib.sha256(content[_DIGEST_BYTES:]).digest() == content[:_DIGEST_BYTES]:
            return torch.load(io.BytesIO(content[_DIGEST_BYTES:]), weights_only=True, map_location="cpu")
        log.warning("%s is corrupt; falling back from step %d to the checkpoint before it", path, step)
    if found:
        raise CheckpointError(
            f"{folder}: none of {len(found)} checkpoints is intact; expected one to go on from; without the folder "
            "training begins anew"
        )
    return None


def _list(folder: Path) -> list[tuple[int, Path]]:
    """(step, file), newest first."""
    names = folder.iterdir() if folder.is_dir() else ()
    matches = ((_NAME.fullmatch(path.name), path) for path in names)
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)
