"""A folder of pictures with captions beside them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal, Self

from pydantic import NonNegativeInt, model_validator
from typing_extensions import override

from trainers.batch import Example, Split
from trainers.config import LocalPath
from trainers.data.buckets import CutConfig
from trainers.data.transforms import open_picture
from trainers.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class FolderConfig(CutConfig):
    """Pictures directly inside one folder; hidden files and other types are passed over."""

    kind: Literal["folder"] = "folder"
    path: LocalPath
    instance_prompt: str | None = None
    """Caption of every picture; null reads `name.txt` beside `name.jpg`."""
    holdout: NonNegativeInt = 0
    """So many pictures, chosen by a hash of their bytes, are kept from training: fidelity is judged against them."""
    holdout_path: LocalPath | None = None
    """A folder of pictures to judge fidelity against instead; they need no captions."""

    @model_validator(mode="after")
    def _one_holdout(self) -> Self:
        if self.holdout and self.holdout_path:
            raise ValueError("holdout and holdout_path exclude each other; set holdout to 0 or remove holdout_path")
        return self

    @override
    def check(self) -> None:
        files = _list_pictures(self.path)
        if self.holdout >= len(files):
            raise DataError(
                f"{self.path}: {len(files)} pictures and holdout is {self.holdout}; expected at least one to train on"
            )
        judged = _list_pictures(self.holdout_path) if self.holdout_path else ()
        self._captions(files)
        if self.strict:
            for file in (*files, *judged):
                open_picture(file)

    @override
    def check_validation(self) -> None:
        if not self.holdout:
            raise ValueError("validation needs captioned pictures that are held out; set data.holdout")

    @override
    def split(self) -> Split:
        files = _list_pictures(self.path)
        captions = self._captions(files)
        examples = [Example(_hash(file), file, captions[file]) for file in files]
        if self.holdout_path:
            candidates = [Example(_hash(file), file, "") for file in _list_pictures(self.holdout_path)]
            held_out, unreadable = self.readable(candidates)
        else:
            # Two copies of a picture have one key and are never on both sides.
            distinct = {example.key: example for example in reversed(examples)}
            held_out, unreadable = self.readable([distinct[key] for key in sorted(distinct)], self.holdout)
        kept = {example.key for example in held_out} | {example.key for example in unreadable}
        train = tuple(example for example in examples if example.key not in kept)
        if len(held_out) < self.holdout or not train:
            raise DataError(
                f"{self.path}: {len(held_out)} pictures to hold out (expected {self.holdout}) and {len(train)} to "
                f"train on, after {len(unreadable)} that cannot be decoded; add pictures or lower holdout"
            )
        train, held_out = (tuple(map(self.shaped, examples)) for examples in (train, held_out))
        return Split(train, held_out, tuple(example.path for example in unreadable))

    def _captions(self, files: tuple[Path, ...]) -> dict[Path, str]:
        if self.instance_prompt is not None:
            return dict.fromkeys(files, self.instance_prompt)
        captions = {file: _read_caption(file.with_suffix(".txt")) for file in files}
        missing = [file for file, caption in captions.items() if caption is None]
        if missing:
            raise DataError(
                f"{self.path}: {len(missing)} of {len(files)} pictures have no caption; expected a text in "
                f"{missing[0].with_suffix('.txt').name}; write it, or set instance_prompt"
            )
        return {file: caption for file, caption in captions.items() if caption is not None}


def _list_pictures(folder: Path) -> tuple[Path, ...]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected a folder of pictures ({', '.join(SUFFIXES)})")
    names = (file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    files = tuple(sorted(file for file in names if file.is_file() or not file.exists()))  # a broken link is said later
    if not files:
        raise DataError(f"{folder}: no pictures; expected files that end in {', '.join(SUFFIXES)}")
    return files


def _read_caption(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error


def _hash(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); check its permissions") from error
