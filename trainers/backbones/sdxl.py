"""Stable Diffusion XL, base and refiner (Podell et al., 2023, arXiv:2307.01952), from a folder in diffusers' layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import override

from trainers.adapters.lora import LORA_FILE, PEFT_FILE, merge_text_lora
from trainers.backbone import Condition, TextEmbeddings
from trainers.config import LocalPath
from trainers.errors import ConfigError, ModelError
from trainers.unet import UnetBackbone, UnetConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from trainers.batch import Geometry

_STAGES = {6: "base", 5: "refiner"}
"""How many numbers a stage's UNet is told: sizes and crop, or the aesthetic score in place of the target size."""


class SdxlConfig(UnetConfig):
    """A local SDXL folder, as `StableDiffusionXLPipeline.save_pretrained` writes it.

    The refiner is the base's folder with `denoiser` set to the refiner's UNet: autoencoder and second text encoder are
    the base's. Its UNet says by its shape that it is one.
    """

    added_embeddings: ClassVar = "text_time"

    kind: Literal["sdxl"] = "sdxl"
    text_encoder_2_adapter: LocalPath | None = None
    """An adapter, as a trial exports it or as a folder of PEFT's, that is merged into the refiner's text encoder, which
    then hears what a base's text-encoder LoRA learned."""

    @property
    @override
    def text_encoder_names(self) -> tuple[str, ...]:
        return ("text_encoder", "text_encoder_2") if self.stage == "base" else ("text_encoder_2",)

    @property
    @override
    def text_layers(self) -> Mapping[str, int]:
        layers = {name: self.setting(name, "num_hidden_layers") for name in self.text_encoder_names}
        # Penultimate states are used, and the projection of the second encoder's last ones.
        return {name: count - (name == "text_encoder") for name, count in layers.items()}

    @override
    def check(self) -> None:
        super().check()
        if (folder := self.text_encoder_2_adapter) is None:
            return
        if self.stage == "base":
            raise ConfigError(
                "train.backbone: text_encoder_2_adapter with SDXL's base; expected it with the refiner alone: remove "
                "it, or set denoiser to the refiner's UNet"
            )
        files = (PEFT_FILE, LORA_FILE)
        if not any((folder / file).is_file() for file in files):
            raise ModelError(f"{folder}: neither {files[0]} nor {files[1]}; expected the adapter of a finished trial")

    @override
    def text_files(self) -> tuple[Path, ...]:
        folder = self.text_encoder_2_adapter
        merged = sorted(file for file in folder.iterdir() if file.is_file()) if folder else ()
        return (*super().text_files(), *merged)

    @override
    def load(self, device: torch.device, dtype: torch.dtype) -> Sdxl:
        self.check()
        return Sdxl(self, device, dtype)

    @property
    def stage(self) -> str:
        """`base` or `refiner`, by how many numbers the UNet wants to be told."""
        file = self.folder("unet") / "config.json"
        if (added := self.component_config("unet").get("addition_embed_type")) != self.added_embeddings:
            raise ModelError(
                f"{file}: addition_embed_type is {added!r}, expected {self.added_embeddings!r}; is this Stable "
                "Diffusion 1 or 2? Then set kind: sd"
            )
        pooled = self.setting("text_encoder_2", "projection_dim")
        found = self.setting("unet", "projection_class_embeddings_input_dim")
        each = self.setting("unet", "addition_time_embed_dim")
        for count, stage in _STAGES.items():
            if found == pooled + count * each:
                return stage
        raise ModelError(
            f"{file}: projection_class_embeddings_input_dim is {found}; expected {pooled + 6 * each} (the base: six "
            f"sizes) or {pooled + 5 * each} (the refiner: four sizes and a score)"
        )

    @property
    def zeros_for_null(self) -> bool:
        """Whether the model was trained to take zero embeddings, not the empty prompt, for no prompt."""
        # The stock pipelines' defaults; the refiner's has always been the empty prompt.
        return self.stage == "base" and self.model_index().get("force_zeros_for_empty_prompt", True)


class Sdxl(UnetBackbone):
    """SDXL's UNet, autoencoder and two text encoders; the refiner listens to the second alone."""

    text_classes: ClassVar = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}

    def __init__(self, config: SdxlConfig, device: torch.device, dtype: torch.dtype) -> None:
        import diffusers

        super().__init__(config, device, dtype)
        self.pipeline = diffusers.StableDiffusionXLPipeline  # pyright: ignore[reportPrivateImportUsage]
        self._zeros_for_null, self._refines = config.zeros_for_null, config.stage == "refiner"
        if config.text_encoder_2_adapter:
            merge_text_lora(self.text_encoders[-1], config.text_encoder_2_adapter, self.pipeline, "text_encoder_2")

    @override
    def embed(self, prompts: list[str | None]) -> TextEmbeddings:
        import torch

        outputs = self.encode([prompt or "" for prompt in prompts])
        # SDXL was trained on penultimate states, before the final norm.
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[-1].text_embeds
        if self._zeros_for_null and None in prompts:
            given = torch.tensor([[prompt is not None] for prompt in prompts], dtype=hidden.dtype, device=hidden.device)
            hidden, pooled = hidden * given[:, :, None], pooled * given
        return TextEmbeddings(hidden, pooled).to(self.device)

    @override
    def condition(self, text: TextEmbeddings, geometries: Sequence[Geometry]) -> Condition:
        import torch

        last = [(geometry.aesthetic,) if self._refines else geometry.target for geometry in geometries]
        rows = [(*geometry.original, *geometry.crop, *end) for geometry, end in zip(geometries, last, strict=True)]
        # As in the stock pipeline, sizes have the embeddings' precision.
        return Condition(text.to(self.device), torch.tensor(rows, dtype=text.hidden.dtype, device=self.device))
