"""Photos of people, several of each, with a caption and the box of the face: what identity methods train on."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError
from typing_extensions import override

from trainers.batch import DataConfig, Example, Geometry, Picture, Split
from trainers.config import LocalPath
from trainers.data.transforms import VERSION, open_picture, upright_size
from trainers.errors import DataError
from trainers.framing import Framing

if TYPE_CHECKING:
    from collections.abc import Iterable

log = logging.getLogger(__name__)

_Corners = tuple[float, float, float, float]
_Side = Annotated[int, Field(gt=0)]


class _Entry(BaseModel):
    """What the index says of one photo; other keys are passed over."""

    text: str
    face_crop: _Corners
    identity: str | None = None
    body_crop: _Corners | None = None
    orig_image_size: tuple[_Side, _Side] | None = None


@dataclass(frozen=True, kw_only=True)
class IdentityExample(Example):
    """A photo of somebody."""

    identity: str
    face: tuple[int, int, int, int]
    """Box of the face in the upright file."""
    framing: Framing
    body: _Corners | None = None
    """Which part of a larger picture the file shows."""
    whole: tuple[int, int] | None = None
    """Height and width of that larger picture."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The face in the picture that is trained on."""
        return self.framing.box(self.face)


class IdentityConfig(DataConfig):
    """A folder of photos, and a JSON file that describes them.

    The index maps each photo's path, relative to the folder, to `text` (a caption in which the trigger word stands
    right after the class word), `face_crop` (left, top, right, bottom in pixels of the upright photo) and, if they are
    known, `identity` (who it is; without it, the subfolder says so, and photos in no subfolder show one person),
    `orig_image_size` ([height, width]) and `body_crop` of the picture that the photo was cut from.

    Photos are resized and cropped to a square that keeps the face in sight, as near to the centre as that allows.
    """

    kind: Literal["identity"] = "identity"
    path: LocalPath
    index: LocalPath | None = None
    """Null is `index.json` in the folder."""
    resolution: PositiveInt
    mirror: bool = True
    """Whether every photo is also shown mirrored, its box with it."""
    min_face: NonNegativeInt = 16
    """A face with a shorter side than this, in pixels of the picture that is trained on, says nothing of anybody: the
    photo is left out and counted, or, if the data is strict, an error."""
    holdout: NonNegativeInt = 0
    """So many photos, chosen by a hash of their bytes, are kept from training; two of each person always stay."""
    embeddings: LocalPath | None = None
    """Face embeddings made before: safetensors, or a dictionary that torch saved, by the photo's path in the index, its
    file name or its stem. Null asks the method's face embedder."""

    @property
    @override
    def size(self) -> tuple[int, int]:
        return self.resolution, self.resolution

    @property
    @override
    def transform(self) -> str:
        return f"square of {self.resolution} around the face, bicubic; {VERSION}"

    @property
    def index_path(self) -> Path:
        """Where the index is."""
        return self.index or self.path / "index.json"

    @override
    def check(self) -> None:
        examples = self._examples()
        if self.embeddings and not self.embeddings.is_file():
            raise DataError(f"{self.embeddings}: no such file; expected face embeddings (train.data.embeddings)")
        check_people(examples, self.index_path)
        if self.strict:
            for example in examples:
                open_picture(example.path)

    def check_validation(self) -> None:
        """Raise ValueError if no photos are held out: there is nothing to evaluate a loss on."""
        if not self.holdout:
            raise ValueError("validation needs photos that are held out; set data.holdout")

    def check_references(self, count: int) -> None:
        """Raise DataError if somebody has no so many photos besides the one that is learnt."""
        check_people(self._examples(), self.index_path, count + 1)

    def check_captions(self, trigger: str) -> None:
        """Look at every caption.

        Raises:
            DataError: One has not exactly one trigger word, or it does not follow a word; the message names the photo.
        """
        for name, entry in self._entries().items():
            if complaint := find_trigger(entry.text, trigger):
                raise DataError(f"{self.index_path}: {name!r}: {complaint} in {entry.text!r}")

    @override
    def split(self) -> Split:
        found = self._examples()
        examples = tuple(replace(example, key=_hash(example.path)) for example in found)
        check_people(examples, self.index_path)
        chosen = self._hold_out(examples)
        held_out = tuple(map(_framed, chosen))
        train = [_framed(example) for example in examples if example not in chosen]
        mirrored = [_mirror(example) for example in train] if self.mirror else []
        readable = {example.path for example in examples}
        unreadable = tuple(path for name in self._entries() if (path := self.path / name) not in readable)
        return Split((*train, *mirrored), held_out, unreadable)

    @override
    def read(self, example: Example) -> Picture:
        import numpy as np
        import torch

        assert isinstance(example, IdentityExample)
        image = example.framing.apply(open_picture(example.path))
        pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1)
        return Picture(pixels.permute(2, 0, 1)[None], _geometry(example))

    def _hold_out(self, examples: tuple[IdentityExample, ...]) -> tuple[IdentityExample, ...]:
        left = Counter(example.identity for example in examples)
        chosen: list[IdentityExample] = []
        for example in sorted(examples, key=lambda one: one.key):
            if len(chosen) < self.holdout and left[example.identity] > 2:
                left[example.identity] -= 1
                chosen.append(example)
        if len(chosen) < self.holdout:
            raise DataError(
                f"{self.index_path}: {len(chosen)} photos can be held out, holdout is {self.holdout}; two photos of "
                "each person stay for training; add photos or lower holdout"
            )
        return tuple(chosen)

    def _examples(self) -> tuple[IdentityExample, ...]:
        found = (self._example(name, entry) for name, entry in self._entries().items())
        return tuple(example for example in found if example is not None)

    def _example(self, name: str, entry: _Entry) -> IdentityExample | None:
        path = self.path / name
        try:
            original = upright_size(path)
        except FileNotFoundError as error:
            raise DataError(f"{self.index_path}: {name!r}: no such file: {path}") from error
        except OSError as error:
            if self.strict:
                raise DataError(f"{self.index_path}: {name!r}: not a picture that can be read: {path}") from error
            return None
        face = _round_outward(entry.face_crop)
        if not (0 <= face[0] < face[2] <= original[1] and 0 <= face[1] < face[3] <= original[0]):
            raise DataError(
                f"{self.index_path}: {name!r}: face_crop is {entry.face_crop} in a picture {original[1]} wide and "
                f"{original[0]} high; expected left < right and top < bottom inside it"
            )
        framing = Framing.around(original, self.size, face)
        if complaint := self._too_small(framing.box(face)):
            if self.strict:
                raise DataError(f"{self.index_path}: {name!r}: {complaint}")
            log.warning("%s: %r: %s", self.index_path, name, complaint)
            return None
        identity = entry.identity if entry.identity is not None else str(Path(name).parent)
        return IdentityExample(
            key="",
            path=path,
            prompt=entry.text,
            identity=identity,
            face=face,
            framing=framing,
            body=entry.body_crop,
            whole=entry.orig_image_size,
        )

    def _too_small(self, box: tuple[int, int, int, int]) -> str | None:
        width, height = box[2] - box[0], box[3] - box[1]
        if min(width, height) >= self.min_face:
            return None
        return (
            f"the face is {width} x {height} pixels large at resolution {self.resolution}; expected at least "
            f"{self.min_face} (min_face): crop the photo closer, or remove it"
        )

    def _entries(self) -> dict[str, _Entry]:
        file = self.index_path
        try:
            content = file.read_bytes()
            tree: Any = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
        except OSError as error:
            raise DataError(f"{file}: no such file; expected a JSON index of the photos in {self.path}") from error
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise DataError(f"{file}, line {line}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
        except ValueError as error:
            raise DataError(f"{file}: not JSON, or not clear ({error})") from error
        if not isinstance(tree, dict) or not tree:
            raise DataError(f"{file}: expected a JSON object that maps photos to their captions and boxes, not empty")
        return {name: self._entry(name, entry) for name, entry in cast("dict[str, Any]", tree).items()}

    def _entry(self, name: str, tree: Any) -> _Entry:
        try:
            return _Entry.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "entry"
            raise DataError(f"{self.index_path}: {name!r}: {place}: {first['msg']}, got {first['input']!r}") from error


def find_trigger(text: str, trigger: str) -> str | None:
    """What is wrong with a caption's trigger word, if anything is."""
    places = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(trigger)}(?!\w)", text)]
    if len(places) != 1:
        return f"the trigger word {trigger!r} stands {len(places)} times, expected once"
    if not re.search(r"\w\s+$", text[: places[0]]):
        return f"the trigger word {trigger!r} does not follow the class word, as in 'a man {trigger} in a suit'"
    return None


def check_people(examples: tuple[IdentityExample, ...], where: Path, needed: int = 2) -> None:
    """Make sure that everybody has photos enough.

    Raises:
        DataError: Somebody has fewer than needed; a reference would be the very picture that is to be learned.
    """
    photos = Counter(identity for identity, _ in {(example.identity, example.path) for example in examples})
    for identity, count in photos.items():
        if count < needed:
            raise DataError(
                f"{where}: usable photos of {identity!r} to train on: {count}; expected at least {needed}: references "
                "must be other photos"
            )


def others(examples: tuple[IdentityExample, ...], index: int, among: int) -> list[int]:
    """Which of the first `among` examples are other photos of the person at `index`, mirrored or not."""
    me = examples[index]
    return [i for i, one in enumerate(examples[:among]) if one.identity == me.identity and one.path != me.path]


def choose_photos(
    examples: tuple[IdentityExample, ...], first: int, candidates: Iterable[int], count: int
) -> list[int]:
    """`first` and then candidates, as they come, of files that are not yet chosen: `count` photos."""
    chosen = {examples[first].path: first}
    for candidate in candidates:
        chosen.setdefault(examples[candidate].path, candidate)
    return list(chosen.values())[:count]


def _mirror(example: IdentityExample) -> IdentityExample:
    framing = Framing.around(example.framing.original, example.framing.size, example.face, mirrored=True)
    return replace(example, key=f"{example.key} mirrored", framing=framing)


def _geometry(example: IdentityExample) -> Geometry:
    """What SDXL is told: of the larger picture, if the file was cut from one and the index says where."""
    framing = example.framing
    if example.body is None or example.whole is None:
        return framing.geometry
    left, top, right, _ = example.body
    scale = framing.resized[1] / (right - left)
    crop = (framing.crop[0] + int(top * scale), framing.crop[1] + int(left * scale))
    return Geometry(example.whole, crop, framing.size)


def _round_outward(corners: _Corners) -> tuple[int, int, int, int]:
    left, top, right, bottom = corners
    return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)


def _framed(example: IdentityExample) -> IdentityExample:
    """With what the index says of the picture, which decides how it is cut and what is told of it, in its key."""
    told = json.dumps([example.key, example.face, example.body, example.whole])
    return replace(example, key=hashlib.sha256(told.encode()).hexdigest())


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different."""
    counts = Counter(name for name, _ in pairs)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is listed twice")
    return dict(pairs)
