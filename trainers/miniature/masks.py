"""Masks of a held-out subject's photos: `python -m trainers.miniature.masks zog studies/data/zog_masks --seed 11`."""

import argparse
import random
from pathlib import Path

from trainers.miniature.recipe import subject_scenes
from trainers.miniature.world import SUBJECTS, mask, random_placement


def save_masks(folder: Path, name: str, seed: int) -> None:
    """One mask for each picture that `save_photos` draws of the subject's scenes with the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for index, scene in enumerate(subject_scenes(name)):
        mask(scene, random_placement(rng)).save(folder / f"{index:02d}.png")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SUBJECTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, required=True, help="that the photos were drawn with")
    arguments = parser.parse_args()
    save_masks(arguments.folder, arguments.name, arguments.seed)


if __name__ == "__main__":
    main()
