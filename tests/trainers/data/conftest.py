"""Shards made on the fly, and a cache folder of their own for what is found out about them."""

# pyright: basic

import io
import json

import pytest
from PIL import Image

from trainers.data.shards import write_shard

CLASSES = ("star", "star", "moon", "star", "heart", "star")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(number, size=(80, 64)):
    """Bytes of a picture that differs for every number."""
    stream = io.BytesIO()
    Image.new("RGB", size, (40 * number % 256, 7 * number % 256, 200)).save(stream, "PNG")
    return stream.getvalue()


def sample(number, **changes):
    """A whole sample; a change to None removes a member."""
    meta = {"image_id": f"id{number}", "ae_aesthetic": 10.0 * number, "species_list": [CLASSES[number % len(CLASSES)]]}
    members = {"png": png(number), "txt": f"picture {number}\n".encode(), "json": json.dumps(meta).encode()} | changes
    return f"{number:03}", {suffix: content for suffix, content in members.items() if content is not None}


@pytest.fixture(name="shards")
def shards_fixture(tmp_path):
    """Folder of two training shards with three and two samples, and one of validation with two."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "train-00000.tar", [sample(number) for number in range(3)])
    write_shard(folder / "train-00001.tar", [sample(number) for number in range(3, 5)])
    write_shard(folder / "val-00000.tar", [sample(number) for number in range(5, 7)])
    return folder
