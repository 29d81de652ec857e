"""Make the miniature family from nothing: `python -m trainers.miniature.recipe FOLDER`.

It takes about four hours on two CPU cores; `--fraction 0.002` makes an untrained but complete family in minutes, and
`--only sd refiner` makes some members from those that are in the folder. The folder then holds `sdxl/`, `clip/`,
`aesthetic.safetensors`, `sd/`, `sd_v/`, `sana/`, `refiner/`, `face/`, `photomaker.safetensors`, `dino/`, `preference/`,
`training.log` and `manifest.json`, which says of each stage its seed, its steps, what it started from and how good the
result is.
"""

import argparse
import hashlib
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainers.miniature import dino, family, generator, members, preference, scorers
from trainers.miniature.members import Making, Quality
from trainers.miniature.pictures import Pictures, plain, wide
from trainers.miniature.training import Schedule
from trainers.miniature.world import Scene, caption, draw, random_placement, random_scene, subject

STEPS = {
    "vae": 1500,
    "decoder": 1000,
    "text": 600,
    "unet": 8000,
    "clip": 1600,
    "aesthetic": 3000,
    **members.STEPS,
    "dino": dino.STEPS,
    "preference": preference.STEPS,
}
"""Optimizer steps of each network."""
_PICTURES = 16_000
_MANIFEST = "manifest.json"
log = logging.getLogger(__name__)
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
    schedule = Schedule(_count(STEPS["unet"], fraction), seed, folder / "denoiser.ckpt")
    generator.train_denoiser(vae, pictures, denoiser, tokenizer, schedule)
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


def _sdxl(making: Making) -> Quality:
    make_generator(making.folder, making.seed, making.fraction)
    return {}


def _scorers(making: Making) -> Quality:
    make_scorers(making.folder, making.seed, making.fraction)
    return {}


STAGES: dict[str, tuple[Callable[[Making], Quality], tuple[str, ...], tuple[str, ...]]] = {
    "sdxl": (_sdxl, ("vae", "decoder", "text", "unet"), ()),
    "scorers": (_scorers, ("clip", "aesthetic"), ()),
    "sd": (members.make_sd, ("sd",), ("sdxl",)),
    "sd_v": (members.make_sd_v, ("sd_v",), ("sdxl", "sd")),
    "sana": (members.make_sana, ("gemma", "dc_ae", "sana"), ("sdxl",)),
    "refiner": (members.make_refiner, ("refiner",), ("sdxl",)),
    "face": (members.make_face, ("face",), ()),
    "photomaker": (members.make_photomaker, ("photomaker",), ("sdxl", "face")),
    "dino": (dino.make_dino, ("dino",), ()),
    "preference": (preference.make_preference, ("preference",), ()),
}
"""By name: what makes it, which networks it trains, and which other parts of the folder it starts from."""


@dataclass(frozen=True)
class Stage:
    """How one stage went."""

    seed: int
    fraction: float
    steps: Mapping[str, int]
    """Optimizer steps of each network, before the fraction."""
    started_from: Mapping[str, str]
    """The sha256 of the files it read, by name."""
    quality: Quality
    """On scenes it has not seen; see the stage's function."""


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


def write_manifest(folder: Path, made: Mapping[str, Stage]) -> None:
    """Record how the stages in `made` went, keep what is known of the others, and note what every file's content is."""
    path = folder / _MANIFEST
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    stages = known.get("stages", {}) | {name: asdict(stage) for name, stage in made.items()}
    manifest = known | {"stages": stages, "sha256": hashes(folder)}
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each file but the manifest and what is only there while a stage runs."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _count(whole: int, fraction: float) -> int:
    return max(4, round(whole * fraction))


def _joined(first: Pictures, second: Pictures) -> Pictures:
    return Pictures(torch.cat([first.pixels, second.pixels]), first.scenes + second.scenes)


def run(making: Making, names: Sequence[str]) -> None:
    """Run some stages in the order of `STAGES`; each is recorded as soon as it is done."""
    for name, (stage, networks, needs) in STAGES.items():
        if name in names:
            inputs = {file: value for file, value in hashes(making.folder).items() if file.split("/")[0] in needs}
            log.info("%s: seed %d, fraction %g", name, making.seed, making.fraction)
            quality = stage(making)
            log.info("%s: %s", name, quality)
            steps = {network: STEPS[network] for network in networks}
            write_manifest(making.folder, {name: Stage(making.seed, making.fraction, steps, inputs, quality)})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the pictures and steps")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), metavar="STAGE", help=f"of {', '.join(STAGES)}")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    log_file = logging.FileHandler(arguments.folder / "training.log", mode="a" if arguments.only else "w")
    handlers = [log_file, logging.StreamHandler()]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    run(Making(arguments.folder, arguments.seed, arguments.fraction), arguments.only or list(STAGES))
    logging.shutdown()
    write_manifest(arguments.folder, {})


if __name__ == "__main__":
    main()
