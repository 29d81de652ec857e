"""The architectures of the miniature family and the folders they are saved in: the layouts real checkpoints have."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trainers.miniature.world import SIZE, words

CONTEXT = 32
"""Tokens of a prompt, the start and end tokens included."""
LATENT_CHANNELS = 12
DOWNSCALE = 8
_TEXT_WIDTH = 64
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Stable Diffusion's noise schedule."""
_START, _END = "<|startoftext|>", "<|endoftext|>"

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": SIZE, "layers": 4, "width": 96, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "width": 96, "heads": 4, "layers": 3, "hf_tokenizer_name": "./"},
}
"""open_clip's `model_cfg`; the vocabulary's size is added when the model is built."""
_CLIP_MEAN, _CLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def build_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer in which each word of the world is one token; other words fall apart into bytes."""
    letters = sorted(ByteLevel.alphabet())
    merges = learn_merges([[*word[:-1], f"{word[-1]}</w>"] for word in words()])
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), _START, _END]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=cast("Any", merges), model_max_length=CONTEXT, pad_token=_END)


def learn_merges(split: Sequence[list[str]]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al., 2016, arXiv:1508.07909) until each word is one piece.

    Unlike the trainer of the tokenizers library it breaks ties in a fixed order, so that a recipe can be repeated.

    Args:
        split: Words as lists of pieces.
    """
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for pieces in split for pair in pairwise(pieces)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        split = [_merged(pieces, best) for pieces in split]
    return merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def build_vae() -> AutoencoderKL:
    """64-pixel pictures to 12 x 8 x 8 latents and back."""
    levels: Any = (16, 32, 64, 64)  # diffusers annotates its tuples as having one element
    return AutoencoderKL(
        down_block_types=cast("Any", ("DownEncoderBlock2D",) * len(levels)),
        up_block_types=cast("Any", ("UpDecoderBlock2D",) * len(levels)),
        block_out_channels=levels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,  # few: a small group would lose the colour of a flat picture
        sample_size=SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """SDXL's layout at small size: pooled text and six size and crop numbers are added to the time embedding."""
    return UNet2DConditionModel(
        sample_size=SIZE // DOWNSCALE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(96, 160),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=cast("Any", (3, 5)),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + _TEXT_WIDTH,
        cross_attention_dim=2 * _TEXT_WIDTH,
        norm_num_groups=16,
    )


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """SDXL's two text encoders; the second one also gives the pooled embedding."""
    config: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 4 * _TEXT_WIDTH,
        "projection_dim": _TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextModel(CLIPTextConfig(**config)), CLIPTextModelWithProjection(CLIPTextConfig(**config))


def build_clip(tokenizer: CLIPTokenizer) -> CLIP:
    """The scoring model: a text and an image tower of open_clip."""
    text: dict[str, Any] = {**CLIP_CONFIG["text_cfg"], "vocab_size": len(tokenizer)}
    return CLIP(CLIP_CONFIG["embed_dim"], CLIPVisionCfg(**CLIP_CONFIG["vision_cfg"]), CLIPTextCfg(**text))


def build_aesthetic_head() -> torch.nn.Sequential:
    """The LAION V2 head's layout (five linear layers, no activation in between) on this family's CLIP embedding."""
    widths = (CLIP_CONFIG["embed_dim"], 32, 16, 8, 8, 1)
    linear = [torch.nn.Linear(a, b) for a, b in pairwise(widths)]
    gap = torch.nn.Identity
    return torch.nn.Sequential(linear[0], gap(), linear[1], gap(), linear[2], gap(), linear[3], linear[4])


def save_sdxl(
    folder: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
) -> None:
    """Save an SDXL folder in half precision, with the scheduler that the stock SDXL folder ships."""
    scheduler = EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading", use_karras_sigmas=False)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoders[0],
        text_encoder_2=text_encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=cast("Any", scheduler),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)


def save_clip(folder: Path, clip: CLIP, tokenizer: CLIPTokenizer) -> None:
    """Save a folder that open_clip's `local-dir:` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    text: dict[str, Any] = {**CLIP_CONFIG["text_cfg"], "vocab_size": len(tokenizer)}
    config = {
        "model_cfg": {**CLIP_CONFIG, "text_cfg": text},
        "preprocess_cfg": {"mean": _CLIP_MEAN, "std": _CLIP_STD, "interpolation": "bicubic", "resize_mode": "squash"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.half().contiguous() for name, tensor in clip.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    tokenizer.save_pretrained(folder)


def save_aesthetic_head(path: Path, head: torch.nn.Sequential) -> None:
    """Save the head under the names that the LAION file uses: `layers.0.weight`, `layers.0.bias` and so on."""
    save_file({f"layers.{name}": tensor.contiguous() for name, tensor in head.state_dict().items()}, path)
