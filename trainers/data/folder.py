"""A folder of pictures with captions beside them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import NonNegativeInt, PositiveInt, model_validator
from typing_extensions import override

from trainers.batch import DataConfig, Example, Picture, Split
from trainers.config import LocalPath
from trainers.data.buckets import BucketsConfig, bucket_order
from trainers.data.transforms import VERSION, cut_picture, open_picture, upright_size
from trainers.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class FolderConfig(DataConfig):
    """Pictures directly inside one folder; hidden files and other types are passed over.

    Every picture is turned upright, resized so that its short side is `resolution`, and cropped to the centred square;
    or, with `buckets`, to the centred rectangle nearest to its own shape.
    """

    kind: Literal["folder"] = "folder"
    path: LocalPath
    resolution: PositiveInt
    buckets: BucketsConfig | None = None
    """Shapes that pictures are cut to; null is the square alone."""
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

    @model_validator(mode="after")
    def _buckets_exist(self) -> Self:
        if self.buckets and not self.sizes:
            raise ValueError(
                f"buckets.step is {self.buckets.step} and resolution {self.resolution}; expected no larger a step"
            )
        return self

    @property
    @override
    def size(self) -> tuple[int, int]:
        return self.resolution, self.resolution

    @property
    @override
    def sizes(self) -> Sequence[tuple[int, int]]:
        return self.buckets.sizes(self.resolution) if self.buckets else (self.size,)

    @property
    @override
    def transform(self) -> str:
        return f"{'its shape' if self.buckets else f'square of {self.resolution}'}, bicubic, centred; {VERSION}"

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
            held_out, unreadable = self._readable(candidates, len(candidates))
        else:
            # Two copies of a picture have one key and are never on both sides.
            distinct = {example.key: example for example in reversed(examples)}
            held_out, unreadable = self._readable([distinct[key] for key in sorted(distinct)], self.holdout)
        kept = {example.key for example in held_out} | {example.key for example in unreadable}
        train = tuple(example for example in examples if example.key not in kept)
        if len(held_out) < self.holdout or not train:
            raise DataError(
                f"{self.path}: {len(held_out)} pictures to hold out (expected {self.holdout}) and {len(train)} to "
                f"train on, after {len(unreadable)} that cannot be decoded; add pictures or lower holdout"
            )
        train, held_out = (tuple(map(self._shaped, examples)) for examples in (train, held_out))
        return Split(train, held_out, tuple(example.path for example in unreadable))

    @override
    def read(self, example: Example) -> Picture:
        return cut_picture(example.path, example.size or self.size)

    @override
    def pick(self, examples: Sequence[Example], seed: int, step: int, position: int, batch_size: int) -> int:
        if self.buckets is None:
            return super().pick(examples, seed, step, position, batch_size)
        return bucket_order(examples).pick(seed, step, position, batch_size)

    def _shaped(self, example: Example) -> Example:
        """With the shape that it is cut to, which is then part of its key."""
        if self.buckets is None:
            return example
        try:
            size = self.buckets.choose(upright_size(example.path), self.resolution)
        except OSError:
            # Whoever decodes it says so.
            size = self.sizes[0]
        key = hashlib.sha256(json.dumps([example.key, *size]).encode()).hexdigest()
        return replace(example, key=key, size=size)

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

    def _readable(self, candidates: list[Example], count: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """The first `count` candidates that decode, and those that were met on the way and do not."""
        good: list[Example] = []
        bad: list[Example] = []
        for example in candidates:
            if len(good) == count:
                break
            try:
                open_picture(example.path)
                good.append(example)
            except DataError:
                if self.strict:
                    raise
                bad.append(example)
        return tuple(good), tuple(bad)


def _list_pictures(folder: Path) -> tuple[Path, ...]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected a folder of pictures ({', '.join(SUFFIXES)})")
    names = (file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    files = tuple(sorted(names))
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
