import gzip
import hashlib
import json
import logging
import os
import tarfile
from pathlib import Path

import pytest
import webdataset

from tests.trainers.data.conftest import png, sample
from trainers.data.shard_index import (
    Layout,
    decode_images,
    hash_images,
    hash_shard,
    index_shard,
    split_name,
)
from trainers.data.shards import write_shard
from trainers.errors import DataError

LAYOUT = Layout(("jpg", "png"), "txt", "json", "species_list", "ae_aesthetic")


def shard_of(tmp_path, *samples):
    write_shard(tmp_path / "a.tar", samples)
    return tmp_path / "a.tar"


def read_by_webdataset(path):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with Path(path).open("rb") as stream:
        return list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))


def problem(tmp_path, layout=LAYOUT, **changes):
    (found,) = index_shard(shard_of(tmp_path, sample(1, **changes)), layout)
    return found.problem


def test_samples_are_those_that_the_webdataset_package_reads(tmp_path):
    path = str(tmp_path / "w.tar")
    with webdataset.TarWriter(path) as writer:
        for number in range(4):
            writer.write({"__key__": f"folder/{number}", **sample(number)[1]})
        writer.write({"__key__": "long" * 40, **sample(7)[1]})
    expected = read_by_webdataset(path)
    found = index_shard(Path(path), LAYOUT)
    assert [one.name for one in found] == [one["__key__"] for one in expected]
    assert [one.image.read_bytes() for one in found] == [one["png"] for one in expected]
    assert [one.caption for one in found] == [one["txt"].decode().strip() for one in expected]


def test_the_webdataset_package_reads_shards_that_are_written_here(tmp_path):
    path = shard_of(tmp_path, sample(0), sample(1))
    assert [(one["__key__"], one["png"]) for one in read_by_webdataset(path)] == [("000", png(0)), ("001", png(1))]


@pytest.mark.parametrize("path", ["a.jpg", "dir.x/a.b.jpg", "a", ".hidden", "A.JPG", "__meta__", "a/b/c.tar.gz", "x."])
def test_names_are_split_as_in_the_webdataset_package(path):
    name, suffix = webdataset.tariterators.base_plus_ext(path)
    assert split_name(path) == ((name, suffix.lower()) if name else ("", ""))


def test_metadata_members_of_the_archive_belong_to_no_sample():
    assert split_name("__index__/a.json") == split_name("__index__") == ("", "")


def test_hidden_files_belong_to_no_sample():
    assert split_name("folder/._001.jpg") == ("", "")


def test_metadata_give_id_classes_and_score(tmp_path):
    found = index_shard(shard_of(tmp_path, sample(3)), LAYOUT)[0]
    assert (found.id, found.classes, found.aesthetic, found.caption) == ("id3", ("star",), 30.0, "picture 3")


@pytest.mark.parametrize(
    ("value", "names"), [("a, b ,", ("a", "b")), (["a", "b"], ("a", "b")), (None, ()), ([], ()), ("", ()), (3, ())]
)
def test_classes_are_a_list_or_separated_by_commas(tmp_path, value, names):
    meta = json.dumps({"species_list": value, "ae_aesthetic": 1}).encode()
    assert index_shard(shard_of(tmp_path, sample(0, json=meta)), LAYOUT)[0].classes == names


@pytest.mark.parametrize(("meta", "name"), [(b"{}", "001"), (b'{"id": 9}', "9"), (b'{"image_id": "a", "id": 9}', "a")])
def test_without_an_id_a_sample_is_known_by_its_name(tmp_path, meta, name):
    shard = shard_of(tmp_path, ("folder/001", sample(1, json=meta)[1]))
    assert index_shard(shard, Layout(("png",), "txt", "json", None, None))[0].id == name


def test_the_first_suffix_of_several_is_the_picture(tmp_path):
    found = index_shard(shard_of(tmp_path, sample(0, jpg=b"jpeg")), LAYOUT)[0]
    assert found.image.read_bytes() == b"jpeg"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"png": None}, "no picture; expected a member 001.jpg or .png"),
        ({"png": b""}, "001.png is empty"),
        ({"txt": None}, "no member 001.txt"),
        ({"txt": b" \n"}, "001.txt is empty"),
        ({"txt": b"\xff\xfe"}, "001.txt is not UTF-8 text"),
        ({"json": None}, "no member 001.json"),
        ({"json": b"{"}, "001.json is not valid JSON"),
        ({"json": b"[1]"}, "001.json is not a JSON object"),
        ({"json": b'{"species_list": []}'}, "001.json: ae_aesthetic is None; expected a number"),
        ({"json": b'{"ae_aesthetic": true}'}, "001.json: ae_aesthetic is True; expected a number"),
    ],
)
def test_what_is_wrong_with_a_sample_is_said_with_its_member(tmp_path, changes, message):
    assert message in problem(tmp_path, **changes)


def test_a_bad_sample_names_shard_and_sample(tmp_path):
    found = index_shard(shard_of(tmp_path, sample(1, png=None)), LAYOUT)[0]
    assert str(found).startswith(f"{tmp_path}/a.tar: sample 001: no picture")


def test_a_bad_sample_is_still_known_by_its_id(tmp_path):
    assert index_shard(shard_of(tmp_path, sample(1, txt=None)), LAYOUT)[0].id == "id1"


def test_metadata_that_nobody_asks_for_may_be_missing(tmp_path):
    assert problem(tmp_path, Layout(("png",), "txt", None, None, None), json=None) is None
    assert problem(tmp_path, Layout(("png",), "txt", "json", None, None), json=b"{}") is None


def test_members_of_one_name_that_are_apart_are_two_samples(tmp_path):
    name, members = sample(0)
    parts = [(name, {"png": members["png"]}), sample(1), (name, {"txt": members["txt"], "json": members["json"]})]
    found = index_shard(shard_of(tmp_path, *parts), LAYOUT)
    assert [bool(one.problem) for one in found] == [True, False, True]


def test_a_member_that_is_there_twice_is_an_error(tmp_path):
    name, members = sample(0)
    with pytest.raises(DataError, match=r"a\.tar/000\.PNG: the sample has a member 'png' twice"):
        index_shard(shard_of(tmp_path, (name, {**members, "PNG": b"x"})), LAYOUT)


@pytest.mark.parametrize("kept", [100, 600, 1600, 3000])
def test_a_shard_that_was_cut_inside_a_member_is_an_error(tmp_path, kept):
    path = shard_of(tmp_path, sample(0), sample(1))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="cannot be read as a tar archive"):
        index_shard(path, LAYOUT)


def test_a_shard_that_was_cut_between_members_has_an_incomplete_sample(tmp_path):
    path = shard_of(tmp_path, sample(0), sample(1))
    with tarfile.open(path) as tar:
        end = tar.getmembers()[5].offset
    path.write_bytes(path.read_bytes()[:end])
    assert [one.problem for one in index_shard(path, LAYOUT)] == [None, "no member 001.json"]


def test_a_shard_that_is_damaged_in_the_middle_is_an_error(tmp_path):
    path = shard_of(tmp_path, sample(0), sample(1))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmembers()[3].offset
    content[start : start + 300] = b"x" * 300
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"damaged after {start} bytes"):
        index_shard(path, LAYOUT)


def test_a_compressed_shard_is_an_error(tmp_path):
    path = shard_of(tmp_path, sample(0))
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match="expected a complete and uncompressed one"):
        index_shard(path, LAYOUT)


def test_an_archive_without_its_last_blocks_is_welcome(tmp_path):
    path = shard_of(tmp_path, sample(0))
    content = path.read_bytes()
    path.write_bytes(content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % 512))
    assert [one.problem for one in index_shard(path, LAYOUT)] == [None]


def test_hashes_are_those_of_the_pictures_bytes(tmp_path):
    path = shard_of(tmp_path, sample(0), sample(1, txt=None))
    assert hash_images(path, LAYOUT) == {"000.png": hashlib.sha256(png(0)).hexdigest()}
    assert hash_shard(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_picture_that_cannot_be_decoded_is_a_problem_when_it_is_looked_for(tmp_path):
    path = shard_of(tmp_path, sample(0), sample(1, png=png(1)[:40]))
    assert [one.problem for one in index_shard(path, LAYOUT)] == [None, None]
    found = decode_images(path, LAYOUT)
    assert found[0].problem is None
    assert "001.png: cannot be decoded" in found[1].problem


def test_a_shard_is_read_once_and_again_when_it_changes(tmp_path, cache_folder, caplog):
    caplog.set_level(logging.INFO, logger="trainers")
    path = shard_of(tmp_path, sample(0))
    first = (index_shard(path, LAYOUT), hash_images(path, LAYOUT))
    assert caplog.messages == [f"{path}: listing its samples", f"{path}: hashing its pictures"]
    caplog.clear()
    forget()
    assert (index_shard(path, LAYOUT), hash_images(path, LAYOUT)) == first
    assert not caplog.records
    write_shard(path, [sample(1), sample(2)])
    os.utime(path, ns=(1, 1))
    assert [one.id for one in index_shard(path, LAYOUT)] == ["id1", "id2"]
    assert len(hash_images(path, LAYOUT)) == 2


def test_another_layout_is_another_list(tmp_path):
    path = shard_of(tmp_path, sample(0, jpg=b"jpeg"))
    assert index_shard(path, LAYOUT)[0].image.name == "000.jpg"
    assert index_shard(path, Layout(("png",), "txt", None, None, None))[0].image.name == "000.png"


def test_what_is_remembered_and_damaged_is_found_out_again(tmp_path, cache_folder):
    path = shard_of(tmp_path, sample(0))
    first = index_shard(path, LAYOUT)
    for file in cache_folder.rglob("*.json"):
        file.write_text("{")
    forget()
    assert index_shard(path, LAYOUT) == first


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(index_shard(shard_of(tmp_path, sample(0)), LAYOUT)) == 1
    assert "cannot be written" in caplog.text


def test_pictures_are_not_read_for_the_list(tmp_path):
    """Twenty samples with a picture of a megabyte each: only headers and texts are read."""
    path = shard_of(tmp_path, *(sample(number, png=bytes(1 << 20)) for number in range(20)))
    before = bytes_read()
    assert len(index_shard(path, LAYOUT)) == 20
    assert bytes_read() - before < 3 << 20


def bytes_read():
    """By this process, so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def forget():
    from trainers.data import shard_index

    shard_index._index.cache_clear()
