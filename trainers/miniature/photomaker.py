"""A PhotoMaker for the miniature world: the published layout at small size, trained by the method of the same name.

From a random identity encoder, the method trains encoder and LoRA together on many people, without branches; what comes
out is packed as `photomaker-v2` is, and is where studies of the method begin.
"""

from pathlib import Path
from typing import Any, cast

import torch

from trainers.adapters.lora import LORA_FILE
from trainers.adapters.photomaker import Checkpoint, IdEncoder, IdSizes, write_checkpoint
from trainers.loop import fit
from trainers.methods.photomaker import PhotoMakerConfig, PhotoMakerMethod
from trainers.rundir import RunDir
from trainers.train import build_accelerator

_RANK = 8


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
    config = PhotoMakerConfig.model_validate(
        {
            "backbone": {"kind": "sdxl", "path": str(family / "sdxl")},
            "data": {"kind": "identity", "path": str(people), "resolution": 64, "mirror": False},
            "photomaker": str(work / "random.safetensors"),
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
    accelerator = build_accelerator(config)
    method = cast("PhotoMakerMethod", config.build(seed, work / "cache", accelerator))
    train_tower(method)
    fit(method, config, RunDir(work), accelerator)
    encoder = {name: value.half() for name, value in method.photomaker.encoder.state_dict().items()}
    write_checkpoint(path, Checkpoint(encoder, _lora(method, work / "lora")))


def train_tower(method: PhotoMakerMethod) -> None:
    """Train the vision tower too, which the method leaves as it is because published ones are CLIP's."""
    for name, parameter in method.photomaker.encoder.vision_model.named_parameters():
        # Tokens are taken from before the last norm.
        parameter.requires_grad = not name.startswith("post_layernorm")


def _lora(method: PhotoMakerMethod, folder: Path) -> dict[str, torch.Tensor]:
    """The trained LoRA under the names that checkpoints have; its alpha is its rank, so nothing else is needed."""
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    method.export(folder)
    return {name: value.half() for name, value in load_file(folder / LORA_FILE).items()}


def _read_json(path: Path) -> dict[str, Any]:
    import json

    return json.loads(path.read_text(encoding="utf-8"))
