"""What lies where in tar shards of the WebDataset format.

A shard is read from end to end once: afterwards every sample is a place in a file, so any sample can be read at any
time, and the order of training is a function of numbers instead of the state of readers and buffers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import tarfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trainers.data.transforms import VERSION, open_picture
from trainers.errors import DataError
from trainers.rundir import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

log = logging.getLogger(__name__)

_FORMAT = 1
"""Of the files that remember; changes with what is in them."""
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Member:
    """A file inside a shard."""

    shard: Path
    name: str
    offset: int
    """Of its first byte, in the shard."""
    size: int

    def read_bytes(self) -> bytes:
        """The file's contents.

        Raises:
            OSError: The shard cannot be read.
        """
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    @property
    def path(self) -> Path:
        """Names the file, as if the shard were a folder."""
        return self.shard / self.name

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Layout:
    """Which members a sample is made of, and which of its metadata matter."""

    image: tuple[str, ...]
    """Suffixes of the picture; the first that a sample has counts."""
    caption: str
    meta: str | None
    classes: str | None
    """Metadata field with the names of what a picture shows."""
    aesthetic: str | None
    """Metadata field with a number."""


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: a picture with its caption, or why there is none."""

    name: str
    """What its members have in common."""
    image: Member
    id: str
    caption: str = ""
    classes: tuple[str, ...] = ()
    aesthetic: float | None = None
    problem: str | None = None
    """Why the sample cannot be used; null if nothing is known against it."""

    def __str__(self) -> str:
        return f"{self.image.shard}: sample {self.name}: {self.problem or 'usable'}"


def index_shard(shard: Path, layout: Layout) -> tuple[Sample, ...]:
    """Every sample of a shard in the order of the archive; headers, captions and metadata are read, pictures are not.

    Members belong together that follow one another and have the same name up to the first dot of the file's name, as
    in the webdataset package.

    Raises:
        DataError: The shard is missing, cut short, compressed, or has a member twice.
    """
    return _index(shard, layout, _stamp(shard))


def hash_images(shard: Path, layout: Layout) -> dict[str, str]:
    """sha256 of each usable picture of a shard, by the name of its member.

    Raises:
        DataError: As `index_shard`.
    """

    def compute() -> dict[str, str]:
        log.info("%s: hashing its pictures", shard)
        usable = [sample.image for sample in index_shard(shard, layout) if sample.problem is None]
        return {image.name: hashlib.sha256(image.read_bytes()).hexdigest() for image in usable}

    return _recall(shard, ("sha256", *_spell(layout)), compute)


def decode_images(shard: Path, layout: Layout) -> tuple[Sample, ...]:
    """As `index_shard`, after decoding every picture: one that cannot be is a problem too."""

    def compute() -> dict[str, str]:
        log.info("%s: decoding its pictures", shard)
        return dict(_undecodable(index_shard(shard, layout)))

    found = _recall(shard, ("undecodable", VERSION, *_spell(layout)), compute)
    samples = index_shard(shard, layout)
    return tuple(replace(s, problem=found[s.image.name]) if s.image.name in found else s for s in samples)


def hash_shard(shard: Path) -> str:
    """sha256 of a whole shard, as `sha256sum` prints it."""

    def compute() -> str:
        log.info("%s: hashing it", shard)
        with shard.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return _recall(shard, ("shard",), compute)


def _undecodable(samples: Iterable[Sample]) -> Iterator[tuple[str, str]]:
    for sample in samples:
        if sample.problem is None:
            try:
                open_picture(sample.image)
            except DataError as error:
                yield sample.image.name, str(error)


@functools.lru_cache(maxsize=4096)
def _index(shard: Path, layout: Layout, _when: tuple[int, int]) -> tuple[Sample, ...]:
    def compute() -> list[dict[str, Any]]:
        log.info("%s: listing its samples", shard)
        with shard.open("rb") as file:
            return [_store(_sample(file, shard, name, members, layout)) for name, members in _groups(shard)]

    return tuple(_restore(shard, entry) for entry in _recall(shard, ("samples", *_spell(layout)), compute))


def _store(sample: Sample) -> dict[str, Any]:
    entry = asdict(sample)
    del entry["image"]["shard"]
    return entry


def _restore(shard: Path, entry: dict[str, Any]) -> Sample:
    rest = {key: value for key, value in entry.items() if key not in ("image", "classes")}
    return Sample(image=Member(shard, **entry["image"]), classes=tuple(entry["classes"]), **rest)


def _groups(shard: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Members by suffix, for each run of members with one name."""
    current, members = "", dict[str, Member]()
    for member in _members(shard):
        name, suffix = split_name(member.name)
        if not name:
            continue
        if members and name != current:
            yield current, members
            members = {}
        current = name
        if suffix in members:
            raise DataError(f"{member}: the sample has a member {suffix!r} twice; expected each suffix once")
        members[suffix] = member
    if members:
        yield current, members


def split_name(path: str) -> tuple[str, str]:
    """Name of the sample that a member belongs to, and the member's suffix in lower case; empty if to none."""
    folder, _, file = path.rpartition("/")
    name, dot, suffix = file.partition(".")
    if not name or not dot or re.match(r"__[^/]*__(/|$)", path):
        return "", ""
    return f"{folder}/{name}" if folder else name, suffix.lower()


def _members(shard: Path) -> Iterator[Member]:
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                if info.isreg():
                    yield Member(shard, info.name, info.offset_data, info.size)
            end = tar.offset
        with shard.open("rb") as file:
            file.seek(end)
            # tarfile takes a damaged header for the end; the true end is a block of zeros, or that of the file.
            if any(file.read(tarfile.BLOCKSIZE)):
                raise DataError(f"{shard}: damaged after {end} bytes; make or copy the shard again")
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{shard}: cannot be read as a tar archive ({error}); expected a complete and uncompressed one"
        ) from error


def _sample(file: Any, shard: Path, name: str, members: dict[str, Member], layout: Layout) -> Sample:
    image = next((members[suffix] for suffix in layout.image if suffix in members), Member(shard, name, 0, 0))
    found = Sample(name, image, id=Path(name).name)
    try:
        if layout.meta:
            found = replace(found, **_metadata(name, _text(file, name, members, layout.meta), layout))
        found = replace(found, caption=_text(file, name, members, layout.caption))
    except _UnusableError as problem:
        return replace(found, problem=str(problem))
    if image.size:
        return found
    wanted = "" if image.name != name else f"no picture; expected a member {name}." + " or .".join(layout.image)
    return replace(found, problem=wanted or f"{image.name} is empty")


def _text(file: Any, name: str, members: dict[str, Member], suffix: str) -> str:
    if suffix not in members:
        raise _UnusableError(f"no member {name}.{suffix}")
    file.seek(members[suffix].offset)
    try:
        text = file.read(members[suffix].size).decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise _UnusableError(f"{name}.{suffix} is not UTF-8 text ({error})") from error
    if not text:
        raise _UnusableError(f"{name}.{suffix} is empty")
    return text


class _UnusableError(Exception):
    """What is wrong with one sample."""


def _metadata(name: str, text: str, layout: Layout) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise _UnusableError(f"{name}.{layout.meta} is not valid JSON ({error})") from error
    if not isinstance(tree, dict):
        raise _UnusableError(f"{name}.{layout.meta} is not a JSON object")
    fields = cast("dict[str, Any]", tree)
    found: dict[str, Any] = {"classes": _names(fields.get(layout.classes)) if layout.classes else ()}
    if identity := fields.get("image_id") or fields.get("id"):
        found["id"] = str(identity)
    if layout.aesthetic:
        found["aesthetic"] = value = fields.get(layout.aesthetic)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise _UnusableError(f"{name}.{layout.meta}: {layout.aesthetic} is {value!r}; expected a number")
    return found


def _names(value: Any) -> tuple[str, ...]:
    """Names from a list, or from text with commas; anything else names nothing."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list):
        return ()
    return tuple(name for part in cast("list[Any]", parts) if (name := str(part).strip()))


def _spell(layout: Layout) -> tuple[str, ...]:
    return (json.dumps(asdict(layout)),)


def _stamp(shard: Path) -> tuple[int, int]:
    try:
        status = shard.stat()
    except OSError as error:
        raise DataError(f"{shard}: cannot be read ({error.strerror}); expected a shard") from error
    return status.st_size, status.st_mtime_ns


def _recall(shard: Path, what: tuple[str, ...], compute: Callable[[], Any]) -> Any:
    """What `compute` found out about a shard, now or when it was last asked: a file of known size and time is known."""
    stamp = [_FORMAT, *what, str(shard.resolve()), *_stamp(shard)]
    name = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()
    file = _folder() / name[:2] / f"{name}.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if isinstance(known, dict) and cast("dict[str, Any]", known).get("stamp") == stamp:
        return cast("dict[str, Any]", known)["found"]
    found = compute()
    try:
        write_atomically(file, json.dumps({"stamp": stamp, "found": found}))
    except OSError as error:
        log.warning("%s cannot be written (%s); %s will be read again next time", file, error, shard)
    return found


def _folder() -> Path:
    """Where what was found out about shards is kept: beside other programs' caches, never beside the shards."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "diffusion-tuning" / "shards"
