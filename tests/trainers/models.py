"""Random model folders small enough for unit tests."""

import string
from pathlib import Path
from typing import Any

from tests.trainers.conftest import TOKENS, build_tokenizer

INSTRUCTION = "enhance the prompt:\nuser prompt: "
"""Shorter than SANA's own: a token is a letter here."""


def build_sana(folder: Path, *, euler: bool = False, seed: int = 0) -> Path:
    """Save a random model in the layout of a stock SANA folder: 64-px pictures, 8x8 latents of 4 channels.

    Args:
        folder: Where to.
        euler: Ship `FlowMatchEulerDiscreteScheduler` instead of the stock folder's DPM-Solver.
        seed: Of the weights.
    """
    import torch
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    torch.manual_seed(seed)
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.printable.replace(" ", "")]
    tokenizer: Any = GemmaTokenizer(
        vocab={letter: i for i, letter in enumerate(letters)}, merges=[], add_bos_token=True
    )
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(letters), hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048, sliding_window=64,
            attn_implementation="eager",
        )
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, sample_size=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
    )  # fmt: skip
    blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        encoder_layers_per_block=(1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (5,)), decoder_qkv_multiscales=((), (), (), (5,)),
        downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.41407,
    )  # fmt: skip
    solver = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
    )
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0) if euler else solver
    SanaPipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)
    return folder


def build_sd(folder: Path, *, prediction_type: str = "epsilon", safety: bool = False, seed: int = 0) -> Path:
    """Save a random model in the layout of a stock Stable Diffusion folder: 64-px pictures, 8x8 latents of 4 channels.

    Args:
        folder: Where to.
        prediction_type: `epsilon` is SD 1.5's layout with its scheduler, `v_prediction` SD 2.1's with its own.
        safety: Whether the folder has a safety checker and its feature extractor, as SD 1.5's has.
        seed: Of the weights.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=37, num_attention_heads=4, num_hidden_layers=3,
            max_position_embeddings=TOKENS, projection_dim=16, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    first = prediction_type == "epsilon"
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, norm_num_groups=8, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4 if first else (2, 4), use_linear_projection=not first,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=[8, 8, 8, 8], norm_num_groups=4, latent_channels=4, sample_size=64, layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    betas: Any = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    shared: Any = {**betas, "steps_offset": 1, "set_alpha_to_one": False}
    scheduler: Any = (
        PNDMScheduler(**shared, skip_prk_steps=True)
        if first
        else DDIMScheduler(**shared, clip_sample=False, prediction_type="v_prediction")
    )
    pipeline = StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=scheduler, tokenizer=tokenizer, text_encoder=text_encoder,
        safety_checker=_safety_checker() if safety else None, requires_safety_checker=safety,
        feature_extractor=CLIPImageProcessor(size=32, crop_size=32) if safety else None,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def _safety_checker() -> Any:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision = {**small, "image_size": 32, "patch_size": 16, "projection_dim": 16}
    return StableDiffusionSafetyChecker(CLIPConfig(text_config=small, vision_config=vision, projection_dim=16))


def build_refiner(folder: Path, base: Path, *, whole: bool = False, seed: int = 1) -> Path:
    """Save a random refiner's UNet that fits the folder of `build_sdxl`.

    Args:
        folder: Where to; the UNet lies in `unet/`.
        base: The base's folder.
        whole: Whether the folder is a stock refiner's: with the base's other components, less the first text encoder.
        seed: Of the weights.
    """
    import torch
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    config: Any = UNet2DConditionModel.load_config(base / "unet")
    width = 32
    refined = {"cross_attention_dim": width, "projection_class_embeddings_input_dim": 5 * 8 + width}
    unet: Any = UNet2DConditionModel.from_config({**config, **refined})
    if not whole:
        unet.save_pretrained(folder / "unet")
        return folder
    components = StableDiffusionXLPipeline.from_pretrained(base, local_files_only=True).components
    kept = {name: components[name] for name in ("vae", "text_encoder_2", "tokenizer_2", "scheduler")}
    pipeline = StableDiffusionXLImg2ImgPipeline(
        **kept, unet=unet, text_encoder=None, tokenizer=None, requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder
