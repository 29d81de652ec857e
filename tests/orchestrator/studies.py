"""A study whose every file is there but empty of meaning: enough for the control plane, which never loads a model."""

import json
import struct
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from orchestrator.spec import StudySpec, load_study
from trainers.rundir import RunDir, RunResult, Score


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file of zeros with a valid header."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * offset)


def build_sdxl_folder(folder: Path) -> Path:
    """What `SdxlConfig.check` looks for."""
    configs: dict[str, dict[str, Any]] = {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "in_channels": 4,
            "out_channels": 4,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
            "cross_attention_dim": 16 + 16,
        },
        "vae": {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 8, 8], "latent_channels": 4},
        "text_encoder": {"hidden_size": 16, "num_hidden_layers": 2},
        "text_encoder_2": {"hidden_size": 16, "num_hidden_layers": 1, "projection_dim": 32},
    }
    for name, config in configs.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    attention = {
        "down.attn1.to_q.weight": (16, 16),
        "down.attn1.to_out.0.weight": (16, 16),
        "conv.weight": (4, 4, 3, 3),
    }
    write_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors", attention)
    write_safetensors(folder / "vae" / "diffusion_pytorch_model.safetensors", {"conv.weight": (4, 3, 3, 3)})
    for name in ("text_encoder", "text_encoder_2"):
        write_safetensors(folder / name / "model.safetensors", {"layers.0.q_proj.weight": (16, 16)})
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text("{}")
        (folder / name / "tokenizer_config.json").write_text("{}")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"beta_start": 0.00085}')
    (folder / "model_index.json").write_text("{}")
    return folder


def build_clip_folder(folder: Path) -> Path:
    """What `read_clip_folder` looks for."""
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 8, "text_cfg": {}}}))
    (folder / "open_clip_model.safetensors").write_bytes(b"")
    return folder


def build_pictures(folder: Path, count: int = 4) -> Path:
    """Captioned pictures."""
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (64, 64), (40 * index, 0, 0)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture {index}")
    return folder


TREE: dict[str, Any] = {
    "name": "t",
    "output": "./runs",
    "trial": {
        "train": {
            "kind": "sdxl_lora",
            "backbone": {"kind": "sdxl", "path": "./sdxl"},
            "data": {"kind": "folder", "path": "./pictures", "resolution": 64, "holdout": 1},
            "optimizer": {"kind": "adamw", "lr": 1.0e-3},
            "steps": 300,
            "batch_size": 4,
        },
        "evaluate": {
            "prompts": ["a zog", "two zogs"],
            "resolution": 64,
            "steps": 5,
            "metrics": {
                "clip_t": {"kind": "clip_text", "model": "./clip"},
                "clip_i": {"kind": "clip_image", "model": "./clip"},
            },
        },
    },
    "search": {
        "train.optimizer.lr": {"kind": "float", "low": 1.0e-4, "high": 1.0e-2, "log": True},
        "train.lora.rank": {"kind": "categorical", "choices": [4, 8, 16]},
    },
    "objective": {"kind": "metric", "name": "clip_t"},
    "tracker": {"kind": "none"},
    "limits": {"trials": 8},
    "confirm_seeds": 0,
}


def build_world(folder: Path) -> Path:
    """Model, scoring model, pictures and a study file in `folder`; returns the study file."""
    build_sdxl_folder(folder / "sdxl")
    build_clip_folder(folder / "clip")
    build_pictures(folder / "pictures")
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(TREE, sort_keys=False))
    return path


def load(folder: Path, *sets: str) -> StudySpec:
    """The study of `TREE`; the files that it names need not exist."""
    path = folder / "study.yaml"
    if not path.exists():
        path.write_text(yaml.safe_dump(TREE, sort_keys=False))
    return load_study(path, sets)[0]


def score(run: RunDir, clip_t: float = 0.3, clip_i: float = 0.6) -> None:
    """Finish a run as a worker does."""
    values = {"clip_t": clip_t, "clip_i": clip_i}
    scores = {
        name: Score(mean=value, standard_error=0.01, num_samples=2, model="fake") for name, value in values.items()
    }
    seconds = {"start": 1.0, "load": 1.0, "train": 2.0, "sample": 1.0, "score": 1.0}
    run.write(run.result, RunResult(scores=scores, seconds=seconds, peak_bytes=2**20, versions={}))
