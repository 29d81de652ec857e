"""What the trained SDXL-layout base knows, as a target for the family's other denoisers.

A student that predicts what the teacher predicts learns from targets without the noise that single examples have, and
needs a fraction of the steps (Hinton et al., 2015, arXiv:1503.02531).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trainers.miniature.family import build_tokenizer, build_vae
from trainers.miniature.scorers import tokens
from trainers.miniature.world import SIZE


@dataclass(frozen=True)
class Teacher:
    """The SDXL-layout base, frozen, in single precision."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    tokenizer: CLIPTokenizer

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `folder`/sdxl."""

        def network(kind: Any, name: str) -> Any:
            model: nn.Module = kind.from_pretrained(folder / "sdxl" / name, dtype=torch.float32, local_files_only=True)
            return model.eval().requires_grad_(False)

        encoders = network(CLIPTextModel, "text_encoder"), network(CLIPTextModelWithProjection, "text_encoder_2")
        found, vae = network(AutoencoderKL, "vae"), build_vae()
        # A new one, since what was read remembers from where, and would write that wherever it is saved.
        vae.load_state_dict(found.state_dict())
        vae.register_to_config(scaling_factor=found.config.scaling_factor)
        vae.eval().requires_grad_(False)
        return cls(vae, network(UNet2DConditionModel, "unet"), encoders, build_tokenizer())

    @torch.no_grad()
    def noise(
        self, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"] | Float[Tensor, " b"], texts: Sequence[str]
    ) -> Float[Tensor, "b c h w"]:
        """The noise it sees in `x_t`."""
        ids = tokens(self.tokenizer, texts)
        first, second = (encoder(ids, output_hidden_states=True) for encoder in self.text_encoders)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        added = {"text_embeds": second.text_embeds, "time_ids": time_ids(len(x_t))}
        return self.unet(x_t, cast("Any", t), hidden, added_cond_kwargs=added).sample


def time_ids(count: int) -> Float[Tensor, "b 6"]:
    """Original size, crop and target size of pictures as they are drawn, one row each."""
    return torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], dtype=torch.float32).expand(count, -1)
