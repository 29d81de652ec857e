"""A small long-tailed data set in shards: `python -m trainers.miniature.shards studies/data/nuvo_shards`.

Objects in the held-out style "nuvo", one class per shape; the second class has half as many pictures as the first, the
third a third, and so on. One more class are plain pictures, so that a model keeps what it knew; what is held out for
validation is all in the style. The folder has what a real data set of this kind has: shards for training and
validation, and manifests with ids, frequencies of classes, counts and hashes. Equal seeds make equal files.
"""

import argparse
import csv
import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainers.data.manifests import hash_ids
from trainers.data.shards import write_shard
from trainers.miniature.pictures import plain
from trainers.miniature.recipe import style_scenes
from trainers.miniature.world import SHAPES, SIZE, Scene, caption, draw, random_placement

STYLE = "nuvo"
_LARGEST = 48
"""Training pictures of the most frequent shape."""
_PLAIN = 60
"""Training pictures of the class `plain`."""
_PER_SHARD = 70
_VALIDATION = 20


@dataclass(frozen=True)
class _Sample:
    scene: Scene
    split: str
    seed: str

    @property
    def id(self) -> str:
        """Names the picture wherever it is."""
        return hashlib.sha256(self.seed.encode()).hexdigest()[:12]

    @property
    def species(self) -> str:
        """Its class."""
        return self.scene.shape if self.scene.style else "plain"

    def members(self) -> dict[str, bytes]:
        """Picture, caption and metadata as files."""
        placement = random_placement(random.Random(self.seed))
        picture = io.BytesIO()
        draw(self.scene, placement).save(picture, "PNG", optimize=True)
        metadata = {
            "image_id": self.id,
            "split": self.split,
            "width": SIZE,
            "height": SIZE,
            # Of somebody who likes large objects; 0 to 100.
            "ae_aesthetic": round(100 * placement.radius / 0.4, 1),
            "species": self.species,
            "species_list": [self.species],
        }
        text = caption(self.scene) + "\n"
        return {"png": picture.getvalue(), "txt": text.encode(), "json": json.dumps(metadata).encode()}


def make(folder: Path, seed: int) -> None:
    """Write shards and manifests into `folder`."""
    counts = [round(_LARGEST / rank) for rank in range(1, len(SHAPES) + 1)]
    shapes = [shape for shape, count in zip(SHAPES, counts, strict=True) for _ in range(count)]
    parts = {
        "train": _samples("train", shapes, seed),
        "val": _samples("val", [SHAPES[i % len(SHAPES)] for i in range(_VALIDATION)], seed),
    }
    (folder / "manifests").mkdir(parents=True, exist_ok=True)
    stats = {split: _write(folder, split, samples) for split, samples in parts.items()}
    (folder / "manifests" / "split_stats.json").write_text(json.dumps(stats, indent=2) + "\n", encoding="utf-8")


def _samples(split: str, shapes: Sequence[str], seed: int) -> list[_Sample]:
    styled = style_scenes(STYLE, len(shapes), seed if split == "train" else seed + 1)
    scenes = [replace(scene, shape=shape) for scene, shape in zip(styled, shapes, strict=True)]
    if split == "train":
        scenes += plain(_PLAIN, seed).scenes
    samples = [_Sample(scene, split, f"{seed}/{split}/{i}") for i, scene in enumerate(scenes)]
    random.Random(f"{seed}/{split}").shuffle(samples)
    return samples


def _write(folder: Path, split: str, samples: Sequence[_Sample]) -> dict[str, object]:
    """One split's shards, ids and frequencies; what `split_stats.json` says of it."""
    shards: dict[str, str] = {}
    for number, start in enumerate(range(0, len(samples), _PER_SHARD)):
        path = folder / f"{split}-{number:05}.tar"
        write_shard(path, [(sample.id, sample.members()) for sample in samples[start : start + _PER_SHARD]])
        shards[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    ids = [sample.id for sample in samples]
    manifests = folder / "manifests"
    (manifests / f"{split}_ids.txt").write_text("".join(f"{name}\n" for name in sorted(ids)), encoding="utf-8")
    found = Counter(sample.species for sample in samples)
    with (manifests / f"{split}_species.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", "count", "fraction"])
        writer.writerows([name, count, f"{count / len(samples):.6f}"] for name, count in found.most_common())
    return {"count": len(ids), "ids_sha256": hash_ids(ids), "shards": shards}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    make(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
