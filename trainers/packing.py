"""Rows of frozen work that memory has no room for: one file a column, mapped into memory.

The operating system reads what is asked for and forgets it when memory is short; processes of one machine share what
has been read.
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

import torch

from trainers.rundir import name_temporary, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

    from trainers.cache import Tensors

MEMORY_BYTES = 4 << 30
"""How much of one kind of frozen work each process keeps in memory. SDXL's moments of a picture of 1024 x 1024 pixels
take 0.5 MiB, its embeddings of a caption 0.6: about 7,000 of each."""

_INDEX = "index.json"


def fits(row: Tensors, count: int) -> bool:
    """Whether `count` rows like this one are few enough to be kept in memory."""
    return count * sum(value.nbytes for value in row.values()) <= MEMORY_BYTES


def pack(folder: Path, rows: Iterable[Tensors | None]) -> None:
    """Write rows of equal shapes, each tensor with a first axis of length one, one after the other into `folder`.

    Args:
        folder: Exists; what it holds under these names is replaced.
        rows: None is a row that there is nothing of.
    """
    kept: list[int] = []
    columns: dict[str, dict[str, Any]] = {}
    temporaries: dict[str, Path] = {}
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for i, row in enumerate(rows):
            if row is None:
                continue
            kept.append(i)
            for name, value in row.items():
                if name not in files:
                    temporaries[name] = name_temporary(folder / f"{name}.bin")
                    files[name] = stack.enter_context(temporaries[name].open("wb"))
                    columns[name] = {"shape": list(value.shape[1:]), "dtype": str(value.dtype).removeprefix("torch.")}
                files[name].write(value.contiguous().view(torch.uint8).numpy())
    for name, temporary in temporaries.items():
        temporary.replace(folder / f"{name}.bin")
    write_atomically(folder / _INDEX, json.dumps({"kept": kept, "columns": columns}))


def load_packed(folder: Path) -> tuple[list[int], Tensors] | None:
    """Numbers of the rows that there are, and their columns, mapped; None if `folder` has not been packed."""
    try:
        index = cast("dict[str, Any]", json.loads((folder / _INDEX).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return None
    kept: list[int] = index["kept"]
    columns: Tensors = {}
    for name, column in index["columns"].items():
        shape, dtype = (len(kept), *column["shape"]), cast("torch.dtype", getattr(torch, column["dtype"]))
        path, size = folder / f"{name}.bin", math.prod(shape)
        if not path.is_file() or path.stat().st_size != size * dtype.itemsize:
            return None
        columns[name] = _mapped(path, size, dtype).view(shape)
    return kept, columns


def _mapped(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype)
