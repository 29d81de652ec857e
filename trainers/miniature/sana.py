"""The family's SANA member: architectures at small size, the prompt's way through Gemma, and the folder it is saved in.

Its autoencoder speaks the language of the SDXL-layout base's: same channels, same values. So the base can teach its
transformer what to draw. The folder's `instruction.txt` is what the text encoder reads before every prompt, in training
and in sampling alike (none before an empty prompt, as the stock pipeline has it).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from jaxtyping import Float
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from trainers.miniature.family import LATENT_CHANNELS, learn_merges
from trainers.miniature.world import words

INSTRUCTION = "Draw what this caption says.\nCaption: "
MAX_LENGTH = 48
"""Tokens of a prompt that the transformer sees."""
SHIFT = 3.0
"""How far the steps of a flow lean towards noise, as in the released models."""
_TEXT_WIDTH, _HEADS, _HEAD_WIDTH = 64, 5, 32
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def build_gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer in which each word of the world is one token, at a prompt's start and after a space."""
    said = [*words(), *INSTRUCTION.replace(".", " ").replace(":", " ").split()]
    corpus = [[*prefix, *word] for word in dict.fromkeys(said) for prefix in ((), ("▁",))]
    merges = learn_merges(corpus)
    signs = [*(chr(code) for code in range(ord("!"), ord("~") + 1)), "▁", "\n"]
    pieces = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *signs, *("".join(pair) for pair in merges)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return GemmaTokenizer(
        vocab=vocabulary,
        merges=cast("Any", merges),
        padding_side="right",
        model_max_length=4 * MAX_LENGTH,
        add_bos_token=True,
        add_eos_token=False,
    )


def build_gemma(tokenizer: GemmaTokenizer) -> Gemma2Model:
    """SANA's text encoder: a causal language model without its head."""
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=3 * _TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=4 * MAX_LENGTH,
        sliding_window=4 * MAX_LENGTH,
        attn_logit_softcapping=None,  # one implementation of attention ignores it
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return Gemma2Model(config)


def build_transformer() -> SanaTransformer2DModel:
    """SANA's linear-attention transformer; one token is one latent, and, as in the 2K models, knows its place."""
    return SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_WIDTH,
        num_layers=5,
        num_cross_attention_heads=_HEADS,
        cross_attention_head_dim=_HEAD_WIDTH,
        cross_attention_dim=_HEADS * _HEAD_WIDTH,
        caption_channels=_TEXT_WIDTH,
        sample_size=8,
        patch_size=1,
        interpolation_scale=cast("Any", 1.0),
    )


def build_dc_ae(scaling_factor: float) -> AutoencoderDC:
    """A deep-compression autoencoder (Chen et al., 2024, arXiv:2410.10733): 64-pixel pictures to 12 x 8 x 8 latents."""
    blocks: Any = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    scales: Any = ((), (), (), (5,))
    widths = (24, 36, 72, 96)
    return AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=24,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(0, 1, 1, 1),  # nothing is computed at full size
        decoder_layers_per_block=(0, 2, 1, 1),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        scaling_factor=scaling_factor,
    )


@dataclass(frozen=True)
class Prompts:
    """What Gemma makes of prompts, as the transformer sees it."""

    hidden: Float[Tensor, "b tokens width"]
    mask: Float[Tensor, "b tokens"]
    """1 where there is a token, 0 where there is padding."""


@dataclass(frozen=True)
class SanaDenoiser:
    """A transformer and the text encoder it reads."""

    transformer: SanaTransformer2DModel
    text_encoder: Gemma2Model
    tokenizer: GemmaTokenizer

    def embed(self, texts: Sequence[str], length: int = MAX_LENGTH) -> Prompts:
        """Prompts as the stock pipeline embeds them: of the instruction only the start token is left.

        Args:
            texts: The empty ones go without instruction.
            length: Tokens; less than `MAX_LENGTH` only leaves out padding, if no prompt is longer.
        """
        tokenizer = cast("Any", self.tokenizer)
        skipped = len(tokenizer(INSTRUCTION).input_ids) - 2  # as the stock pipeline counts
        given = [INSTRUCTION + text.lower().strip() if text else "" for text in texts]
        options = {"padding": "max_length", "max_length": skipped + length, "truncation": True}
        found = tokenizer(given, return_tensors="pt", **options)
        states = self.text_encoder(found.input_ids, attention_mask=found.attention_mask).last_hidden_state
        after = torch.tensor([[skipped if text else 0] for text in texts])
        chosen = torch.arange(length)[None] + after * (torch.arange(length) > 0)
        return Prompts(states[torch.arange(len(texts))[:, None], chosen], found.attention_mask.gather(1, chosen))

    def velocity(
        self, x_t: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], prompts: Prompts
    ) -> Float[Tensor, "b c h w"]:
        """Noise minus picture, as the transformer sees it at noise level `sigma` (0 to 1)."""
        t = cast("Any", sigma * 1000)
        return self.transformer(
            x_t, encoder_hidden_states=prompts.hidden, encoder_attention_mask=prompts.mask, timestep=t
        ).sample


def save_sana(folder: Path, vae: AutoencoderDC, denoiser: SanaDenoiser) -> None:
    """Save a SANA folder in half precision, with the released models' scheduler, and the instruction beside it."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, num_train_timesteps=1000
    )
    pipeline = SanaPipeline(
        tokenizer=cast("Any", build_gemma_tokenizer()),  # a used one would be saved with the last call's padding
        text_encoder=cast("Any", denoiser.text_encoder),
        vae=vae,
        transformer=denoiser.transformer,
        scheduler=scheduler,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    (folder / "instruction.txt").write_text(INSTRUCTION, encoding="utf-8")
