import json
from collections import Counter
from pathlib import Path

import pytest

from trainers.data.manifests import ManifestsConfig
from trainers.data.shards import ShardsConfig
from trainers.miniature import shards as generator
from trainers.miniature.world import SHAPES

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "studies" / "data" / "nuvo_shards"


def config(folder):
    manifests = ManifestsConfig(
        train_ids=folder / "manifests" / "train_ids.txt",
        validation_ids=folder / "manifests" / "val_ids.txt",
        split_stats=folder / "manifests" / "split_stats.json",
    )
    return ShardsConfig(
        train=folder / "train-{00000..00002}.tar",
        validation=folder / "val-00000.tar",
        resolution=64,
        manifests=manifests,
        mix={"table": folder / "manifests" / "train_species.csv", "schedule": {"kind": "constant", "value": 1.0}},
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    generator.make(folder, seed=7)
    return folder


def test_shards_that_ship_fit_their_manifests():
    config(SHIPPED).check()


def test_shards_that_are_made_fit_their_manifests(made):
    config(made).check()


def test_shards_that_ship_are_those_that_the_script_makes(made):
    """Compressed bytes may differ between versions of zlib; what they say does not."""
    mine, theirs = config(made).split(), config(SHIPPED).split()
    assert [(e.sample.id, e.prompt) for e in mine.train] == [(e.sample.id, e.prompt) for e in theirs.train]
    assert [e.prompt for e in mine.held_out] == [e.prompt for e in theirs.held_out]
    for example, other in zip(mine.train[:10], theirs.train[:10], strict=True):
        assert config(made).read(example).pixels.equal(config(SHIPPED).read(other).pixels)


def test_the_classes_have_a_long_tail_and_the_table_counts_them(made):
    examples = config(made).split().train
    counts = Counter(example.sample.classes[0] for example in examples)
    assert [counts[name] for name in (*SHAPES, "plain")] == [48, 24, 16, 12, 10, 8, 7, 6, 5, 5, 60]
    assert config(made).mix.frequencies() == pytest.approx({n: c / len(examples) for n, c in counts.items()}, abs=1e-5)


def test_every_caption_names_class_and_style_unless_the_picture_is_plain(made):
    split = config(made).split()
    for example in (*split.train, *split.held_out):
        (name,) = example.sample.classes
        assert example.prompt.endswith("in nuvo style") == (name != "plain")
        assert name in example.prompt.split() or name == "plain"


def test_another_seed_makes_other_shards(made, tmp_path):
    generator.make(tmp_path, seed=8)
    stats = [json.loads((folder / "manifests" / "split_stats.json").read_text()) for folder in (made, tmp_path)]
    assert stats[0]["train"]["ids_sha256"] != stats[1]["train"]["ids_sha256"]
    with pytest.raises(Exception, match="ids are not in the shards"):
        config(made).model_copy(update={"train": tmp_path / "train-{00000..00002}.tar"}).check()
