"""A short trial of the tiny model that hears pictures and labels, and what its tests ask of it."""

# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportOperatorIssue=false

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import trainers.methods  # noqa: F401, registers the kinds
from tests.trainers.conftest import draw
from trainers.method import MethodConfig
from trainers.prompt import Prompt

FEATURES, LABELS = 6, 3
EMBED = {"in_features": FEATURES}
LABEL = {"in_features": LABELS, "layer_norm": True}
T = torch.tensor([7, 700])
PIPELINES: dict[str, Any] = {"sdxl": StableDiffusionXLPipeline, "sd": StableDiffusionPipeline}


def write_pairs(folder: Path) -> Path:
    """Six pictures with captions, labels and embeddings; the table is as a user would write it."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = ["image,caption,label,embedding"]
    for number in range(6):
        draw(number).save(folder / f"{number}.png")
        np.save(folder / f"{number}.npy", rng.normal(size=FEATURES).astype(np.float32))
        label = " ".join(f"{value:.2f}" for value in rng.normal(size=LABELS))
        rows.append(f"{number}.png,a zog number {number},{label},{number}.npy")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "pairs.csv"


def build_config(folder: Path, pairs: Path, /, **changes: Any) -> Any:
    """Keywords replace top-level keys; None removes them."""
    tree: dict[str, Any] = {
        "kind": "ip_adapter",
        "backbone": {"kind": "sdxl", "path": str(folder)},
        "data": {"kind": "pairs", "path": str(pairs), "resolution": 64},
        "embed_to_token": EMBED,
        "label_to_token": LABEL,
        "optimizer": {"kind": "adamw", "lr": 1e-2},
        "steps": 6,
        "batch_size": 4,
        "checkpoint_every": 2,
        "log_every": 2,
    }
    return MethodConfig.model_validate({k: value for k, value in (tree | changes).items() if value is not None})


def build_vision(folder: Path) -> Path:
    """A random CLIP vision tower."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=FEATURES,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def stock(folder: Path, kind: str = "sdxl") -> Any:
    """The plain pipeline in a folder."""
    options = {} if kind == "sdxl" else {"safety_checker": None}
    return PIPELINES[kind].from_pretrained(folder, local_files_only=True, **options)


def shake(method: Any) -> None:
    """Give everything that is trained other weights, as if it had been."""
    rng = torch.Generator().manual_seed(5)
    for trained in method.trained().values():
        for parameter in trained.parameters().values():
            parameter.data = torch.randn(parameter.shape, generator=rng) * 0.3


def dropout(caption: float = 0.0, image: float = 0.0, label: float = 0.0, joint: float = 0.0) -> dict[str, Any]:
    """The options that say what is dropped; by default nothing."""
    streams = {"embed_to_token": {**EMBED, "dropout": image}, "label_to_token": {**LABEL, "dropout": label}}
    return {"caption_dropout": caption, "joint_dropout": joint, **streams}


def prompts(pairs: Path) -> list[Prompt]:
    """Two prompts that say all that can be heard."""
    return [
        Prompt(text="a", embedding=pairs.parent / "0.npy", label=(0.5, -1, 2)),
        Prompt(text="b", embedding=pairs.parent / "1.npy", label=(1, 1, 0)),
    ]


def noise(model: Any) -> torch.Tensor:
    """Latents for two prompts, always the same."""
    return torch.randn(2, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def predict(model: Any, said: list[Prompt]) -> torch.Tensor:
    """What a model answers to two prompts."""
    return model.denoise(noise(model), T, model.prepare(said, 64, 64))
