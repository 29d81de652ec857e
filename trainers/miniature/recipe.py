"""Make the miniature family from nothing: `python -m trainers.miniature.recipe FOLDER`.

It takes about two hours on two CPU cores; `--fraction 0.002` makes an untrained but complete family in a minute. The
folder then holds `sdxl/`, `clip/`, `aesthetic.safetensors`, `training.log` and `manifest.json` (seeds, hashes).
"""

import argparse
import hashlib
import json
import logging
import random
from dataclasses import replace
from pathlib import Path

import torch

from trainers.miniature import family, generator, scorers
from trainers.miniature.pictures import Pictures, plain, wide
from trainers.miniature.world import Scene, caption, draw, random_placement, random_scene, subject

STEPS = {"vae": 1500, "decoder": 1000, "text": 600, "unet": 8000, "clip": 1600, "aesthetic": 3000}
"""Optimizer steps of each network."""
_PICTURES = 16_000
SUBJECT_BACKGROUNDS = ("blue", "red", "green", "yellow", "black", "orange", "pink", "cyan")
"""Backgrounds of the subject's photos; the other colours are left for prompts that ask for something new."""


def make_generator(folder: Path, seed: int, fraction: float) -> None:
    """Train the SDXL-layout base on the plain world and save it as `folder`/sdxl."""
    pictures = plain(_count(_PICTURES, fraction), seed)
    seen_by_vae = wide(_count(_PICTURES, fraction), seed + 1)
    vae = generator.train_vae(_joined(pictures, seen_by_vae), _count(STEPS["vae"], fraction), seed)
    generator.refine_decoder(vae, _joined(pictures, seen_by_vae), _count(STEPS["decoder"], fraction), seed)
    generator.set_scaling_factor(vae, pictures)
    tokenizer = family.build_tokenizer()
    text_encoders = generator.train_text_encoders(pictures, tokenizer, _count(STEPS["text"], fraction), seed)
    torch.manual_seed(seed)
    denoiser = generator.Denoiser(family.build_unet(), text_encoders)
    schedule = generator.Schedule(_count(STEPS["unet"], fraction), seed, folder / "denoiser.ckpt")
    generator.train_denoiser(vae, pictures, denoiser, tokenizer, schedule)
    schedule.checkpoint.unlink(missing_ok=True)
    family.save_sdxl(folder / "sdxl", vae, denoiser.unet, denoiser.text_encoders, tokenizer)


def make_scorers(folder: Path, seed: int, fraction: float) -> None:
    """Train the scoring models on the wide world and save them as `folder`/clip and `folder`/aesthetic.safetensors."""
    tokenizer = family.build_tokenizer()
    pictures = wide(_count(_PICTURES, fraction), seed + 2)
    clip = scorers.train_clip(pictures, tokenizer, _count(STEPS["clip"], fraction), seed)
    family.save_clip(folder / "clip", clip, tokenizer)
    rated = wide(_count(_PICTURES // 4, fraction), seed + 3)
    head = scorers.train_aesthetic_head(clip, rated, _count(STEPS["aesthetic"], fraction), seed)
    family.save_aesthetic_head(folder / "aesthetic.safetensors", head)


def save_photos(folder: Path, scenes: list[Scene], seed: int) -> None:
    """Draw each scene once, as a PNG with its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for index, scene in enumerate(scenes):
        draw(scene, random_placement(rng)).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(caption(scene) + "\n", encoding="utf-8")


def subject_scenes(name: str) -> list[Scene]:
    """Two pictures of a held-out subject on each of eight backgrounds."""
    return [subject(name, background) for background in SUBJECT_BACKGROUNDS for _ in range(2)]


def style_scenes(style: str, count: int, seed: int) -> list[Scene]:
    """Plain objects drawn in a held-out style."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng, portraits=0)
        if scene.fill == "solid" and not scene.outlined:
            scenes.append(replace(scene, style=style))
    return scenes


def write_manifest(folder: Path, seed: int, fraction: float) -> None:
    """Record how the family was made and what every file's content is."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    hashes = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    manifest = {"seed": seed, "fraction": fraction, "steps": STEPS, "sha256": hashes}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _count(whole: int, fraction: float) -> int:
    return max(4, round(whole * fraction))


def _joined(first: Pictures, second: Pictures) -> Pictures:
    return Pictures(torch.cat([first.pixels, second.pixels]), first.scenes + second.scenes)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the pictures and steps")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    log_file = logging.FileHandler(arguments.folder / "training.log", mode="w")
    handlers = [log_file, logging.StreamHandler()]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    make_generator(arguments.folder, arguments.seed, arguments.fraction)
    make_scorers(arguments.folder, arguments.seed, arguments.fraction)
    logging.shutdown()
    write_manifest(arguments.folder, arguments.seed, arguments.fraction)


if __name__ == "__main__":
    main()
