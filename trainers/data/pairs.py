"""A table of pictures with what is known of each: caption, label vector, embedding."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from pydantic import NonNegativeInt, model_validator
from typing_extensions import override

from trainers.batch import Example, Split
from trainers.config import LocalPath
from trainers.data.buckets import CutConfig
from trainers.data.transforms import open_picture
from trainers.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

COLUMNS = ("image", "caption", "label", "embedding")
_REQUIRED = ("image", "caption")
EMBEDDINGS = (".npy", ".safetensors")
"""Ends of the names of embedding files."""


@dataclass(frozen=True)
class Pair(Example):
    """A row of the table."""

    label: tuple[float, ...] | None = None
    """Numbers of the label vector."""
    embedding: Path | None = None
    """File with a precomputed embedding of the picture."""
    where: str = ""
    """File and line, for messages."""


class PairsConfig(CutConfig):
    """Rows of a `.csv` file with a header, or of a `.jsonl` file; both in UTF-8.

    Columns: `image` (a picture file) and `caption` (may be empty), and where wanted `label` (in CSV numbers separated
    by blanks, in JSONL a list) and `embedding` (a `.npy` or `.safetensors` file with one vector). Paths are relative
    to the table.
    """

    kind: Literal["pairs"] = "pairs"
    path: LocalPath
    holdout: NonNegativeInt = 0
    """So many pictures, chosen by a hash of their bytes, are kept from training: fidelity is judged against them."""
    holdout_path: LocalPath | None = None
    """Another table, of the same columns, to judge fidelity against instead."""

    @model_validator(mode="after")
    def _one_holdout(self) -> Self:
        if self.holdout and self.holdout_path:
            raise ValueError("holdout and holdout_path exclude each other; set holdout to 0 or remove holdout_path")
        return self

    @override
    def check(self) -> None:
        rows = _read(self.path)
        pictures = {row.path for row in rows}
        if self.holdout >= len(pictures):
            raise DataError(
                f"{self.path}: {len(pictures)} pictures and holdout is {self.holdout}; expected one to train on"
            )
        for row in self.rows():
            if self.strict:
                open_picture(row.path)

    @override
    def check_validation(self) -> None:
        if not self.holdout and not self.holdout_path:
            raise ValueError("validation needs pairs that are held out; set data.holdout or data.holdout_path")

    def rows(self) -> list[Pair]:
        """All rows, those to judge by last, without the pictures' hashes.

        Raises:
            DataError: A table cannot be read, or a row is not as described or names a file that is not there.
        """
        return [row for table in (self.path, self.holdout_path) if table for row in _read(table)]

    @override
    def split(self) -> Split:
        rows = _hashed(_read(self.path))
        if self.holdout_path:
            held_out, unreadable = self.readable(_hashed(_read(self.holdout_path)))
        else:
            # Two rows of a picture have one key and are never on both sides.
            distinct = {row.key: row for row in reversed(rows)}
            held_out, unreadable = self.readable([distinct[key] for key in sorted(distinct)], self.holdout)
        kept = {row.key for row in (*held_out, *unreadable)}
        train = tuple(row for row in rows if row.key not in kept)
        if len(held_out) < self.holdout or not train:
            raise DataError(
                f"{self.path}: {len(held_out)} pictures to hold out (expected {self.holdout}) and {len(train)} rows to "
                f"train on, after {len(unreadable)} that cannot be decoded; add pictures or lower holdout"
            )
        train, held_out = (tuple(map(self.shaped, part)) for part in (train, held_out))
        return Split(train, held_out, tuple(row.path for row in unreadable))


def check_pairs(rows: Iterable[Pair], label: int | None, embedding: int | None) -> None:
    """Refuse rows that lack what a method needs, without reading more than headers.

    Args:
        rows: Of one table.
        label: Length of the label vectors; None is that none are needed.
        embedding: Length of the embeddings in files; None is that none are needed.

    Raises:
        DataError: Names file and row.
    """
    for row in rows:
        if label is not None and row.label is None:
            raise DataError(f"{row.where}: no label; expected {label} numbers")
        if label is not None and row.label is not None and len(row.label) != label:
            raise DataError(f"{row.where}: the label has {len(row.label)} numbers; expected {label} (in_features)")
        if embedding is not None:
            if row.embedding is None:
                raise DataError(f"{row.where}: no embedding; name a file with one, or set image_encoder")
            check_embedding(row.embedding, row.where, embedding)


def check_embedding(path: Path, where: str, length: int) -> None:
    """Look at the header of a file with an embedding.

    Raises:
        DataError: It cannot be read, or has not so many numbers; begins with `where`.
    """
    shape = _shape(path, where)
    if math.prod(shape) != length or length not in shape:
        raise DataError(f"{where}: {path} has shape {shape}; expected {length} numbers (in_features)")


def _shape(path: Path, where: str) -> tuple[int, ...]:
    """Shape of the embedding in a file, from its header."""
    import numpy as np
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False).shape
        opened: Any = safe_open(path, "np")
        with opened as file:
            names: list[str] = list(file.keys())
            return tuple(file.get_slice(names[0]).get_shape()) if len(names) == 1 else (len(names), 0)
    except (OSError, EOFError, ValueError, SafetensorError) as error:
        raise DataError(f"{where}: {path} cannot be read ({error}); expected one vector of numbers") from error


def _read(table: Path) -> list[Pair]:
    if table.suffix not in _READERS:
        raise DataError(f"{table}: expected a table of pairs in a .csv or .jsonl file")
    lines = _READERS[table.suffix](table)
    rows = [_pair(row, table, f"{table}, line {line}") for line, row in lines]
    if not rows:
        raise DataError(f"{table}: no rows; expected one picture a row with {', '.join(COLUMNS)}")
    return rows


def _hashed(rows: list[Pair]) -> list[Pair]:
    """Rows with their pictures' hashes; each picture is read once."""
    hashes: dict[Path, str] = {}
    for row in rows:
        if row.path not in hashes:
            hashes[row.path] = _hash(row)
    return [replace(row, key=hashes[row.path]) for row in rows]


def _pair(row: dict[str, Any], table: Path, where: str) -> Pair:
    unknown = sorted(set(row) - set(COLUMNS))
    missing = [name for name in _REQUIRED if not isinstance(row.get(name), str)]
    if unknown or missing:
        complaint = f"unknown column {unknown[0]!r}" if unknown else f"no {missing[0]}"
        raise DataError(f"{where}: {complaint}; expected {', '.join(_REQUIRED)} and perhaps label, embedding")
    path = _file(row["image"], table, where, "image")
    label = _label(row.get("label"), where)
    named = row.get("embedding")
    embedding = _file(named, table, where, "embedding") if named else None
    if embedding and embedding.suffix not in EMBEDDINGS:
        raise DataError(f"{where}: embedding {named!r}; expected a file that ends in {' or '.join(EMBEDDINGS)}")
    return Pair("", path, row["caption"].strip(), label=label, embedding=embedding, where=where)


def _file(name: object, table: Path, where: str, column: str) -> Path:
    path = table.parent / name if isinstance(name, str) and name.strip() else None
    if path is None or not path.is_file():
        raise DataError(f"{where}: {column} {name!r} is no file; expected a path relative to {table.parent}")
    return path


def _label(value: object, where: str) -> tuple[float, ...] | None:
    """The numbers of a label, from CSV text or a JSON list."""
    if value is None or value == "":
        return None
    parts = value.split() if isinstance(value, str) else value
    try:
        numbers = tuple(float(part) for part in cast("list[Any]", parts))
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: label {value!r} is not a list of numbers; expected such as 0 1 0.5") from error
    if not all(math.isfinite(number) for number in numbers):
        raise DataError(f"{where}: label {value!r} has infinite or undefined numbers")
    return numbers or None


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a table of pairs") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    columns = len(reader.fieldnames or ())
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{path}, line {reader.line_num}: expected {columns} cells, as in the header")
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: not valid CSV ({error})") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path}, line {line}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {line}: expected a mapping with {', '.join(COLUMNS)}")
        yield line, cast("dict[str, Any]", row)


def _hash(row: Pair) -> str:
    try:
        return hashlib.sha256(row.path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{row.where}: image {row.path} cannot be read ({error}); check its permissions") from error


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl}
