"""Random scoring models, small enough for unit tests, in the folders that real ones come in."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CONTEXT = 32
WIDTH = 16


def build_tokenizer(context: int = CONTEXT) -> Any:
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPTokenizer

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=context)


def build_open_clip(folder: Path, *, seed: int = 0, own_tokenizer: bool = True) -> Path:
    """An open_clip folder for 64-px pictures; without its own tokenizer it uses the one in open_clip's wheel."""
    import torch
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tokenizer = build_tokenizer()
    vision = {"image_size": 64, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16}
    text = {"context_length": CONTEXT, "vocab_size": len(tokenizer), "width": 32, "heads": 4, "layers": 2}
    if own_tokenizer:
        text["hf_tokenizer_name"] = "./"
        tokenizer.save_pretrained(folder)
    else:
        text["vocab_size"] = 49408  # of the tokenizer in the wheel
    torch.manual_seed(seed)
    model = CLIP(WIDTH, CLIPVisionCfg(**vision), CLIPTextCfg(**text))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    config = {
        "model_cfg": {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def build_transformers_clip(folder: Path, *, seed: int = 0) -> Path:
    """A CLIPModel folder for 48-px pictures."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = build_tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = CLIPTextConfig(
        **small, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(**small, image_size=48, patch_size=16)
    torch.manual_seed(seed)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder


def noise(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A picture of random blocks; `size` is (width, height)."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def save_head(path: Path, widths: tuple[int, ...] = (WIDTH, 12, 8, 6, 4, 1), *, seed: int = 0) -> Path:
    """A random aesthetic head in the layout of the LAION file."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    tensors = {}
    for index, (fan_in, fan_out) in zip((0, 2, 4, 6, 7), itertools.pairwise(widths), strict=True):
        tensors[f"layers.{index}.weight"] = rng.normal(size=(fan_out, fan_in)).astype(np.float32)
        tensors[f"layers.{index}.bias"] = rng.normal(size=fan_out).astype(np.float32)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_open_clip(tmp_path_factory.mktemp("models") / "tiny-open-clip")


@pytest.fixture(scope="session")
def transformers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_transformers_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture(scope="session")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_head(tmp_path_factory.mktemp("heads") / "head.safetensors")
