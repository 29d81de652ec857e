import hashlib
import json

import pytest

from tests.trainers.data.conftest import sample
from trainers.data.manifests import hash_ids
from trainers.data.shards import ShardsConfig, write_shard
from trainers.errors import DataError

TRAIN = [f"id{number}" for number in range(5)]
VALIDATION = ["id5", "id6"]


@pytest.fixture
def check(shards):
    def run(**manifests):
        paths = {key: str(path) for key, path in manifests.items()}
        tree = {"train": f"{shards}/train-{{00000..00001}}.tar", "validation": f"{shards}/val-00000.tar"}
        ShardsConfig.model_validate({**tree, "resolution": 64, "manifests": paths}).check()

    return run


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def stats(path, **entries):
    return write(path, json.dumps({"total": 7, **entries}))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_manifests_that_fit_are_accepted(tmp_path, shards, check):
    files = {shard.name: sha256(shard) for shard in shards.glob("train-*.tar")}
    train = {"count": 5, "ids_sha256": sha256(write(tmp_path / "t.txt", "\n".join(TRAIN) + "\n")), "shards": files}
    check(
        train_ids=tmp_path / "t.txt",
        validation_ids=write(tmp_path / "v.txt", "id6\r\nid5"),
        split_stats=stats(tmp_path / "s.json", train={**train, "num_species": 3}, val={"count": 2}),
    )


def test_the_hash_of_ids_does_not_depend_on_their_order():
    assert hash_ids(["b", "a"]) == hash_ids(["a", "b"]) == hashlib.sha256(b"a\nb\n").hexdigest()


def test_a_lost_sample_is_named(tmp_path, check):
    with pytest.raises(DataError, match=r"t\.txt: 1 ids are not in the shards \(id9\)"):
        check(train_ids=write(tmp_path / "t.txt", "\n".join([*TRAIN, "id9"])))


def test_a_sample_that_nobody_listed_is_named(tmp_path, check):
    with pytest.raises(DataError, match=r"v\.txt: 1 ids are in the shards only \(id6\)"):
        check(validation_ids=write(tmp_path / "v.txt", "id5\n"))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"train": {"count": 6}}, r"train\.count is 6, but of the shards 5"),
        ({"validation": {"count": 1}}, r"validation\.count is 1, but of the shards 2"),
        ({"val": {"ids_sha256": "0"}}, r"val\.ids_sha256 is '0'"),
        ({"train": {"shards": {"train-00000.tar": "0"}}}, r"train\.shards\.train-00000\.tar is '0'"),
        ({"train": {"shards": {"train-00009.tar": "0"}}}, r"shards\.train-00009\.tar is '0', but of the shards None"),
    ],
)
def test_statistics_that_differ_are_an_error(tmp_path, check, entries, message):
    with pytest.raises(DataError, match=message):
        check(split_stats=stats(tmp_path / "s.json", **entries))


def test_an_exchanged_shard_of_the_same_samples_is_noticed(tmp_path, shards, check):
    path = stats(tmp_path / "s.json", val={"count": 2, "shards": {"val-00000.tar": sha256(shards / "val-00000.tar")}})
    check(split_stats=path)
    write_shard(shards / "val-00000.tar", [sample(5), sample(6, txt=b"another caption")])
    with pytest.raises(DataError, match=r"val\.shards\.val-00000\.tar"):
        check(split_stats=path)


@pytest.mark.parametrize("entries", [{}, {"train": 5}, {"train": {"species": 3}}])
def test_statistics_without_anything_to_compare_are_an_error(tmp_path, check, entries):
    with pytest.raises(DataError, match="nothing to compare"):
        check(split_stats=stats(tmp_path / "s.json", **entries))


def test_a_manifest_that_cannot_be_read_is_an_error(tmp_path, check):
    with pytest.raises(DataError, match="cannot be read"):
        check(train_ids=tmp_path / "absent.txt")
    with pytest.raises(DataError, match="not valid JSON"):
        check(split_stats=write(tmp_path / "s.json", "{"))
