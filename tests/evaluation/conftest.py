"""Random scoring models, small enough for unit tests, in the folders that real ones come in."""

# pyright: basic

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CONTEXT = 32
WIDTH = 16
SMALL: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 3, "num_hidden_layers": 2}
PIXELS: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
PIXELS |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


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
    vision: dict[str, Any] = {"image_size": 64, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16}
    text: dict[str, Any] = {
        "context_length": CONTEXT,
        "vocab_size": len(tokenizer),
        "width": 32,
        "heads": 4,
        "layers": 2,
    }
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
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }
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


def build_dino(folder: Path, form: str = "vit") -> Path:
    """A random transformer in a folder of one of the forms, for 32-px pictures."""
    import torch
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    torch.manual_seed(0)
    if form == "timm":
        import timm
        from safetensors.torch import save_file

        folder.mkdir()
        name = "vit_small_patch16_224"
        size: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
        model = timm.create_model(name, num_classes=0, **size)
        config = {
            "architecture": name,
            "num_classes": 0,
            "num_features": 24,
            "global_pool": "token",
            "model_args": size,
        }
        config["pretrained_cfg"] = {"tag": "dino", "input_size": [3, 32, 32], "num_classes": 0, "crop_pct": 1.0}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(model.state_dict(), folder / "model.safetensors")
        return folder
    if form == "dinov2":
        Dinov2Model(Dinov2Config(**SMALL, image_size=28, patch_size=14)).save_pretrained(folder)
        kind = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}, "do_center_crop": True}
        kind |= {"crop_size": {"height": 28, "width": 28}}
    else:
        ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=16), add_pooling_layer=False).save_pretrained(folder)
        kind = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS | kind))
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


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_dino(tmp_path_factory.mktemp("models") / "tiny-dino")
