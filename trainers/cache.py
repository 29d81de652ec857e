"""What was computed once, kept on disk by what determines it."""

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from trainers.rundir import name_temporary, write_atomically

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]

_CHUNK_BYTES = 1 << 20


class Cache:
    """A folder of safetensors files named by what determines their contents; any number of processes may share it.

    A file is complete or absent. One that cannot be read is made again.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, key: str) -> Path:
        """A folder for files that people may want to look at, such as pictures."""
        folder = self._root / "folders" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def get(self, key: str) -> Tensors | None:
        """What was stored under `key`, if anything can be read."""
        import safetensors.torch
        from safetensors import SafetensorError

        path = self._path(key)
        try:
            return safetensors.torch.load_file(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            log.warning("cache: %s cannot be read (%s); computing it again", path, error)
            return None

    def put(self, key: str, tensors: Tensors) -> None:
        """Store `tensors` under `key`."""
        from safetensors.torch import save

        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = name_temporary(path)
        temporary.write_bytes(save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}))
        temporary.replace(path)

    def hash_files(self, files: Iterable[Path]) -> str:
        """Hash of the contents of `files`; a file whose path, size and time are known is not read again."""
        return digest(*(self._hash_file(file) for file in files))

    def _path(self, key: str) -> Path:
        return self._root / key[:2] / f"{key}.safetensors"

    def _hash_file(self, path: Path) -> str:
        path = path.resolve()
        status = path.stat()
        stamp = [str(path), status.st_size, status.st_mtime_ns]
        memo = self._root / "files" / f"{digest(str(path))}.json"
        try:
            known = json.loads(memo.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            known = None
        if isinstance(known, dict) and known.get("stamp") == stamp:
            return str(known["sha256"])  # pyright: ignore[reportUnknownArgumentType]
        found = hash_file(path)
        write_atomically(memo, json.dumps({"stamp": stamp, "sha256": found}))
        return found


def digest(*parts: str) -> str:
    """sha256 of a sequence of strings; different sequences have different digests."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()
