"""What a data set says about itself, compared with its shards."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, cast

from trainers.config import Config, LocalPath
from trainers.data.shard_index import hash_shard
from trainers.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_NAMES = {"train": ("train",), "validation": ("val", "validation")}
"""What `split_stats.json` may call each split."""


class ManifestsConfig(Config):
    """Files that say which samples a data set has, so that a lost or exchanged shard is noticed.

    Samples are known by the `image_id` (or `id`) of their metadata, or else by their name in the shard. `split_stats`
    is a JSON object; of its entries `train` and `val` (or `validation`), these are compared and all else is passed
    over: `count`, the number of samples; `ids_sha256`, the sha256 of the sorted ids with a line feed after each;
    `shards`, which gives the sha256 of each shard by its file name.
    """

    train_ids: LocalPath | None = None
    """Text with one id per line, in any order."""
    validation_ids: LocalPath | None = None
    split_stats: LocalPath | None = None

    def check(self, ids: Mapping[str, Sequence[str]], shards: Mapping[str, Sequence[Path]]) -> None:
        """Compare with what the shards hold.

        Args:
            ids: Of all samples in the shards, those that cannot be used included; by split.
            shards: The files, by split.

        Raises:
            DataError: Something differs, or a file cannot be read.
        """
        for split, path in (("train", self.train_ids), ("validation", self.validation_ids)):
            if path is not None:
                _check_ids(path, ids[split])
        if self.split_stats is not None:
            _check_stats(self.split_stats, ids, shards)


def _check_ids(path: Path, ids: Sequence[str]) -> None:
    expected, got = {line.strip() for line in _read(path).split("\n")} - {""}, set(ids)
    for what, names in (("are not in the shards", expected - got), ("are in the shards only", got - expected)):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise DataError(f"{path}: {len(names)} ids {what} ({some}); expected the ids of the shards' samples")


def _check_stats(path: Path, ids: Mapping[str, Sequence[str]], shards: Mapping[str, Sequence[Path]]) -> None:
    try:
        tree = json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); expected an object with entries train and val") from error
    stats = cast("dict[str, Any]", tree if isinstance(tree, dict) else {})
    compared = [
        _check_entry(f"{path}: {name}", stats[name], ids[split], shards[split])
        for split, names in _NAMES.items()
        for name in names
        if isinstance(stats.get(name), dict)
    ]
    if not any(compared):
        raise DataError(
            f"{path}: nothing to compare; expected train and val with count, ids_sha256 or shards; remove split_stats "
            "if the file has none of them"
        )


def _check_entry(where: str, stats: dict[str, Any], ids: Sequence[str], shards: Sequence[Path]) -> bool:
    """Compare what an entry has; whether it had anything to compare."""
    expected = {key: stats[key] for key in ("count", "ids_sha256") if key in stats}
    found: dict[str, Any] = {"count": len(ids), "ids_sha256": hash_ids(ids)}
    if isinstance(stats.get("shards"), dict):
        expected |= {f"shards.{name}": value for name, value in stats["shards"].items()}
        found |= {f"shards.{shard.name}": hash_shard(shard) for shard in shards}
    for key, value in expected.items():
        if found.get(key) != value:
            raise DataError(
                f"{where}.{key} is {value!r}, but of the shards {found.get(key)!r}; are all complete and listed?"
            )
    return bool(expected)


def hash_ids(ids: Sequence[str]) -> str:
    """What `sort ids.txt | sha256sum` prints in the C locale."""
    return hashlib.sha256("".join(f"{name}\n" for name in sorted(ids)).encode()).hexdigest()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a UTF-8 text") from error
