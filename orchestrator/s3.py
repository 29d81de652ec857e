"""Folders of S3, and a folder of this machine that follows one of them, or leads it."""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from trainers.errors import LaunchError

_LOGS = (".db-wal", ".db-shm")
"""SQLite's, which mean nothing without the moment of their database."""


class Stored(NamedTuple):
    """What S3 says of a file."""

    size: int
    """Bytes."""
    tag: str
    """Differs if the content does."""


class Bucket:
    """What lies below `s3://bucket/prefix`, through a client of boto3."""

    def __init__(self, client: Any, uri: str) -> None:
        self._client = client
        self._bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        self._prefix = prefix

    def files(self) -> dict[str, Stored]:
        """Every file by its name after the prefix."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
        found = [item for page in pages for item in page.get("Contents", [])]
        return {item["Key"].removeprefix(self._prefix): Stored(item["Size"], item["ETag"]) for item in found}

    def write(self, name: str, text: str) -> None:
        """One small file."""
        self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=text.encode())

    def remove(self, name: str) -> None:
        """One file, if it is there."""
        self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)

    def read(self, name: str) -> str:
        """One small file."""
        return self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)["Body"].read().decode()

    def upload(self, path: Path, name: str) -> None:
        """One file of any size."""
        self._client.upload_file(str(path), self._bucket, self._prefix + name)

    def download(self, name: str, path: Path) -> None:
        """One file of any size, which replaces what is there at once."""
        part = path.with_name(f".{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._client.download_file(self._bucket, self._prefix + name, str(part))
        part.replace(path)


class Mirror:
    """A folder with a copy in S3. Each side has one writer at a time, and only what changed is copied.

    What is `ignored` are files and folders of these names, at any depth, and whatever a link leads to.
    """

    LAST = ("result.json", "error.json")
    """Who finds one of them finds everything else."""

    def __init__(self, bucket: Bucket, folder: Path, ignored: frozenset[str] = frozenset()) -> None:
        self._bucket, self._folder, self._ignored = bucket, folder, ignored
        self._sent: dict[str, tuple[int, int]] = {}
        self._received: dict[str, Stored] = {}

    def download(self) -> None:
        """Copy what is new in S3 into the folder.

        Raises:
            LaunchError: The disk has no room for it, or a name leads out of the folder.
        """
        files = self._bucket.files()
        files = {name: stored for name, stored in files.items() if self._ignored.isdisjoint(name.split("/"))}
        new = {name: stored for name, stored in files.items() if self._received.get(name) != stored}
        need, free = sum(stored.size for stored in new.values()), shutil.disk_usage(self._folder).free
        if need > free:
            raise LaunchError(f"{self._folder}: got {free:,} free bytes; expected the {need:,} that are downloaded")
        for name in sorted(new, key=lambda name: (name in self.LAST, name)):
            if ".." in PurePosixPath(name).parts or name.startswith("/"):
                raise LaunchError(f"{self._folder}: got the file name {name!r} from S3; expected one inside the folder")
            if not name.endswith("/"):  # which is how consoles store a folder
                self._bucket.download(name, self._folder / name)
            for log in _LOGS if name.endswith(".db") else ():  # of the database that was there before
                (self._folder / f"{name.removesuffix('.db')}{log}").unlink(missing_ok=True)
        self._received |= new

    def upload(self) -> None:
        """Copy what is new in the folder to S3."""
        for path in sorted(self._files(), key=lambda path: (path.name in self.LAST, path)):
            try:
                name, stamp = path.relative_to(self._folder).as_posix(), _stamp(path)
                if self._sent.get(name) != stamp:
                    self._send(path, name)
                    self._sent[name] = stamp
            except FileNotFoundError:
                continue  # it was replaced or removed meanwhile

    def _send(self, path: Path, name: str) -> None:
        if path.suffix != ".db":
            self._bucket.upload(path, name)
            return
        whole = path.with_name(f".{path.name}.whole")  # a database that is written to is not one file
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(whole)) as copy:
            source.backup(copy)
        self._bucket.upload(whole, name)
        whole.unlink()

    def give(self) -> None:
        """Copy what S3 does not have to it; what it has may be newer."""
        known = self._bucket.files()
        for path in self._files():
            name = path.relative_to(self._folder).as_posix()
            if name not in known:
                self._bucket.upload(path, name)

    def _files(self) -> Iterator[Path]:
        for path in self._folder.rglob("*"):
            ours = self._ignored.isdisjoint(path.relative_to(self._folder).parts)
            if ours and not path.name.startswith(".") and not path.name.endswith(_LOGS) and path.is_file():
                yield path


def _stamp(path: Path) -> tuple[int, int]:
    """Differs when the file was written to, or SQLite's log of it."""
    log = path.with_name(f"{path.stem}{_LOGS[0]}")
    found = [file.stat() for file in (path, log) if file == path or file.exists()]
    return max(one.st_mtime_ns for one in found), sum(one.st_size for one in found)
