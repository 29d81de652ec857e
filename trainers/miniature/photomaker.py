"""A PhotoMaker for the miniature world: the published layout at small size, trained by the method of the same name.

From a random identity encoder, the method trains encoder and LoRA together on many people, without branches; what comes
out is packed as `photomaker-v2` is, and is where studies of the method begin.
"""

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from trainers.adapters.lora import LORA_FILE
from trainers.adapters.photomaker import Checkpoint, IdEncoder, IdSizes, write_checkpoint
from trainers.backbone import TextEmbeddings
from trainers.batch import Geometry
from trainers.loop import fit
from trainers.methods.photomaker import PhotoMakerConfig, PhotoMakerMethod
from trainers.miniature.portraits import TRIGGER, crowd, photo
from trainers.miniature.world import SIZE
from trainers.people.model import PhotoMaker
from trainers.people.words import Words
from trainers.rundir import RunDir
from trainers.train import build_accelerator

if TYPE_CHECKING:
    from trainers.face import FaceEmbedder

_RANK = 8
_TIMES = (100, 300, 500, 700, 900)


def build_id_encoder(face: int, width: int, seed: int) -> IdEncoder:
    """A random identity encoder.

    Args:
        face: Numbers of the face embedder.
        width: Of the text embeddings.
        seed: Of the weights.
    """
    torch.manual_seed(seed)
    sizes = IdSizes(
        hidden=64, mlp=128, layers=2, patch=8, image=32, projections=(width // 2, width - width // 2), face=face,
        face_hidden=128, width=width, tokens=2, depth=2, inner=128, feedforward=256,
    )  # fmt: skip
    return IdEncoder(sizes)


def train_photomaker(family: Path, people: Path, path: Path, steps: int, seed: int) -> None:
    """Train an identity encoder and PhotoMaker's LoRA, and write the checkpoint `path`.

    Args:
        family: Holds `sdxl/` and `face/`.
        people: What `trainers.miniature.portraits.save_people` wrote; hundreds of people, several photos of each.
        path: Ends in `.safetensors`. A folder beside it keeps the state of an interrupted training.
        steps: Optimizer steps.
        seed: Of everything random.
    """
    face = cast("int", _read_json(family / "face" / "config.json")["size"])
    width = cast("int", _read_json(family / "sdxl" / "unet" / "config.json")["cross_attention_dim"])
    work = path.with_suffix(".work")
    write_checkpoint(work / "random.safetensors", Checkpoint(build_id_encoder(face, width, seed).state_dict(), {}))
    config = _config(family, work / "random.safetensors", people, steps)
    accelerator = build_accelerator(config)
    method = cast("PhotoMakerMethod", config.build(seed, work / "cache", accelerator))
    train_tower(method)
    fit(method, config, RunDir(work), accelerator)
    encoder = {name: value.half() for name, value in method.photomaker.encoder.state_dict().items()}
    write_checkpoint(path, Checkpoint(encoder, _lora(method, work / "lora")))


def _config(family: Path, photomaker: Path, people: Path, steps: int) -> PhotoMakerConfig:
    return PhotoMakerConfig.model_validate(
        {
            "backbone": {"kind": "sdxl", "path": str(family / "sdxl")},
            "data": {"kind": "identity", "path": str(people), "resolution": 64, "mirror": False},
            "photomaker": str(photomaker),
            "faces": {"kind": "miniature", "path": str(family / "face")},
            "branches": {"branched_self": False, "branched_cross": False},
            "train_id_encoder": True,
            "lora": {"rank": _RANK},
            "optimizer": {"kind": "adamw", "lr": 1e-3},
            "schedule": {"kind": "cosine", "warmup_steps": min(50, steps // 10)},
            "loss": {"weighting": {"kind": "min_snr", "gamma": 5.0}},
            "steps": steps,
            "batch_size": 16,
            "checkpoint_every": 250,
        }
    )


def train_tower(method: PhotoMakerMethod) -> None:
    """Train the vision tower too, which the method leaves as it is because published ones are CLIP's."""
    for name, parameter in method.photomaker.encoder.vision_model.named_parameters():
        # Tokens are taken from before the last norm.
        parameter.requires_grad = not name.startswith("post_layernorm")


@torch.no_grad()
def photomaker_quality(family: Path, path: Path, count: int, seed: int) -> dict[str, float]:
    """Denoising losses on photos of people it has not met, with identity tokens of another photo.

    Args:
        family: Holds `sdxl/` and `face/`.
        path: The checkpoint.
        count: People.
        seed: Who they are.

    Returns:
        With their own tokens, with somebody else's, and with none; and how often they were not found, which leaves them
        out.
    """
    config = _config(family, path, family, 1)
    model = config.load_photomaker(config.backbone, 0, build_accelerator(config))
    rows: list[Any] = []
    for place, person in enumerate(crowd(count, seed)):
        rng = random.Random(f"quality/{seed}/{place}")
        reference, shown = photo(person, rng), photo(person, rng)
        image = reference.draw()
        face = cast("FaceEmbedder", model.faces).find(image, reference.box)
        if face is None:
            continue
        pixels = torch.from_numpy(np.asarray(shown.draw(), np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        x0 = model.clean_latents(model.backbone.encode_image(pixels))
        rows.append((model.reader.read(shown.caption(TRIGGER)), model.identify(image, face.box, face.embedding), x0))
    words, tokens, x0 = (Words.cat([row[0] for row in rows]), *(torch.cat([row[k] for row in rows]) for k in (1, 2)))
    told = {
        "own": (model.encoder.fuse(words.hidden, tokens, words.mask), words.pooled),
        "other": (model.encoder.fuse(words.hidden, tokens.roll(1, 0), words.mask), words.pooled),
        "none": (words.plain_hidden, words.plain_pooled),
    }
    found = {f"loss_{name}": _loss(model, TextEmbeddings(*text), x0) for name, text in told.items()}
    return found | {"not_found": round(1 - len(rows) / count, 4)}


def _loss(model: PhotoMaker, text: TextEmbeddings, x0: Tensor) -> float:
    """Mean over a grid of timesteps, with the same noise in every call."""
    backbone, errors = model.backbone, list[Tensor]()
    condition = backbone.condition(text, [Geometry.whole(SIZE, SIZE)] * len(x0))
    for time in _TIMES:
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(time))
        t = torch.full((len(x0),), time)
        errors.append((backbone.denoise(backbone.process.add_noise(x0, noise, t), t, condition) - noise).square())
    return round(float(torch.stack(errors).mean()), 5)


def _lora(method: PhotoMakerMethod, folder: Path) -> dict[str, torch.Tensor]:
    """The trained LoRA under the names that checkpoints have; its alpha is its rank, so nothing else is needed."""
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    method.export(folder)
    return {name: value.half() for name, value in load_file(folder / LORA_FILE).items()}


def _read_json(path: Path) -> dict[str, Any]:
    import json

    return json.loads(path.read_text(encoding="utf-8"))
