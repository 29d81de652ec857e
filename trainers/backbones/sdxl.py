"""Stable Diffusion XL, base and refiner (Podell et al., 2023, arXiv:2307.01952), from a folder in diffusers' layout."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import override

from trainers.adapters.lora import LORA_FILE, PEFT_FILE, load_lora, merge_text_lora
from trainers.backbone import Condition, TextEmbeddings
from trainers.config import LocalPath
from trainers.errors import ConfigError, ModelError
from trainers.unet import UnetBackbone, UnetConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from trainers.batch import Geometry
    from trainers.prompt import Prompt

_STAGES = {6: "base", 5: "refiner"}
"""How many numbers a stage's UNet is told: sizes and crop, or the aesthetic score in place of the target size."""


_REFINED_TIMESTEPS = 200
"""The refiner was trained on the last 200 of 1000 timesteps (section 2.5)."""

_BEGUN = "begun_"
"""What names begin with of what the base is told."""


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
    after_base: bool = False
    """For the refiner: draw pictures with the base of `path` until 200 timesteps are left, and finish them with the
    refiner, as SDXL's authors do (section 2.5). False draws with the refiner alone."""
    base_adapter: LocalPath | None = None
    """With `after_base`, the adapter of a finished trial that the base draws with; null is the base as it is."""

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
        options = {"text_encoder_2_adapter": self.text_encoder_2_adapter, "after_base": self.after_base}
        for name in (name for name, value in options.items() if value and self.stage == "base"):
            raise ConfigError(
                f"train.backbone: {name} with SDXL's base; expected it with the refiner alone: remove it, or set "
                "denoiser to the refiner's UNet"
            )
        if self.after_base:
            self.base.check()
        if self.base_adapter and not self.after_base:
            raise ConfigError("train.backbone: base_adapter without after_base, so no base draws; add or remove one")
        for folder, files in (
            (self.text_encoder_2_adapter, (PEFT_FILE, LORA_FILE)),
            (self.base_adapter, (LORA_FILE,)),
        ):
            if folder and not any((folder / file).is_file() for file in files):
                raise ModelError(f"{folder}: neither {' nor '.join(files)}; expected the adapter of a finished trial")

    @property
    def base(self) -> SdxlConfig:
        """The base beside the refiner.

        Raises:
            ModelError: The folder's own UNet is not the base's.
        """
        config = self.model_copy(
            update={"denoiser": None, "text_encoder_2_adapter": None, "after_base": False, "base_adapter": None}
        )
        if config.stage != "base":
            raise ModelError(
                f"{self.path}/unet: the refiner's; after_base expects the base there, denoiser the refiner"
            )
        return config

    @override
    def text_files(self) -> tuple[Path, ...]:
        folder = self.text_encoder_2_adapter
        merged = sorted(file for file in folder.iterdir() if file.is_file()) if folder else ()
        return (*super().text_files(), *merged)

    @override
    def load(self, device: torch.device, dtype: torch.dtype) -> Sdxl:
        self.check()
        return SdxlAfterBase(self, device, dtype) if self.after_base else Sdxl(self, device, dtype)

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

    config: SdxlConfig
    text_classes: ClassVar = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}

    def __init__(self, config: SdxlConfig, device: torch.device, dtype: torch.dtype) -> None:
        import diffusers

        super().__init__(config, device, dtype)
        self.pipeline = diffusers.StableDiffusionXLPipeline  # pyright: ignore[reportPrivateImportUsage]
        self._zeros_for_null, self._refines = config.zeros_for_null, config.stage == "refiner"
        self._merge(self.text_encoders[-1])

    def _merge(self, encoder: nn.Module) -> None:
        """Let a refiner's text encoder hear what a base's adapter learned."""
        if self.config.text_encoder_2_adapter:
            merge_text_lora(encoder, self.config.text_encoder_2_adapter, self.pipeline, "text_encoder_2")

    @override
    def untrained(self, name: str) -> nn.Module:
        network = super().untrained(name)
        if name == "text_encoder_2":
            self._merge(network)
        return network

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


class SdxlAfterBase(Sdxl):
    """The refiner, which finishes pictures that the base has begun: SDXL's ensemble of expert denoisers.

    Trained and judged by its loss it is the refiner alone; the base is loaded when the first pictures are drawn.
    """

    @cached_property
    def base(self) -> Sdxl:
        """The base that begins pictures, frozen."""
        config, adapter = self.config.base, self.config.base_adapter
        base = Sdxl(config, self.device, self.dtype)
        # One copy of what both have; a text encoder that was trained is no longer the one that the folder has.
        base.vae = self.vae
        adapted = self.config.text_encoder_2_adapter or self.text_is_adapted
        if adapter:
            load_lora(adapter, base.pipeline, base.networks)
        elif not adapted:
            base.text_encoders = (base.text_encoders[0], self.text_encoders[0])
        return base

    @override
    def rest(self, busy: Sequence[nn.Module]) -> None:
        super().rest(busy)
        vars(self).pop("base", None)  # which is read again for the next pictures

    @override
    def prepare(
        self, prompts: Sequence[Prompt | None], height: int, width: int, *, negative: str | None = None
    ) -> Condition:
        told, begun = (Sdxl.prepare(model, prompts, height, width, negative=negative) for model in (self, self.base))
        assert begun.sizes is not None
        extra = {**begun.text.tensors(), "sizes": begun.sizes}
        return replace(told, extra={**told.extra, **{_BEGUN + name: value for name, value in extra.items()}})

    @override
    def denoise(
        self, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"] | Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b c h w"]:
        begun = {name: value for name, value in condition.extra.items() if name.startswith(_BEGUN)}
        # Only pictures that are being drawn have a base, and their rows are all at one timestep.
        if begun and float(t.flatten()[0]) >= _REFINED_TIMESTEPS:
            told = {name.removeprefix(_BEGUN): value for name, value in begun.items()}
            sizes = told.pop("sizes")
            return self.base.denoise(x_t, t, Condition(TextEmbeddings(**told), sizes))
        own = {name: value for name, value in condition.extra.items() if name not in begun}
        return super().denoise(x_t, t, replace(condition, extra=own))
