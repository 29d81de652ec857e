"""Stable Diffusion 1.x and 2.x (Rombach et al., 2022, arXiv:2112.10752), from a folder in diffusers' layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import override

from trainers.backbone import Condition, TextEmbeddings
from trainers.errors import ModelError
from trainers.unet import UnetBackbone, UnetConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from trainers.batch import Geometry


class SdConfig(UnetConfig):
    """A local folder, as `StableDiffusionPipeline.save_pretrained` writes it; its scheduler says what it predicts."""

    added_embeddings: ClassVar = None

    kind: Literal["sd"] = "sd"

    @property
    @override
    def text_layers(self) -> Mapping[str, int]:
        return {"text_encoder": self.setting("text_encoder", "num_hidden_layers")}

    @override
    def check(self) -> None:
        super().check()
        if self.component_config("text_encoder").get("use_attention_mask"):
            raise ModelError(
                f"{self.folder('text_encoder')}/config.json: use_attention_mask is true; expected Stable Diffusion's "
                "own text encoder, which sees padding"
            )

    @override
    def load(self, device: torch.device, dtype: torch.dtype) -> Sd:
        self.check()
        return Sd(self, device, dtype)


class Sd(UnetBackbone):
    """Stable Diffusion's UNet, autoencoder and text encoder."""

    text_classes: ClassVar = {"text_encoder": "CLIPTextModel"}

    def __init__(self, config: SdConfig, device: torch.device, dtype: torch.dtype) -> None:
        import diffusers

        super().__init__(config, device, dtype)
        self.pipeline = diffusers.StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    @override
    def embed(self, prompts: list[str | None]) -> TextEmbeddings:
        (output,) = self.encode([prompt or "" for prompt in prompts])
        return TextEmbeddings(output.last_hidden_state.to(self.device))

    @override
    def condition(self, text: TextEmbeddings, geometries: Sequence[Geometry]) -> Condition:
        return Condition(text.to(self.device))
