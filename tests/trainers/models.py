"""Random model folders small enough for unit tests."""

import string
from pathlib import Path
from typing import Any

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
