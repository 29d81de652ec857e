"""LoRA of SDXL's UNet, base or refiner, and if wanted of its text encoders, on captioned pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator
from typing_extensions import override

from trainers.method import Method, Trained
from trainers.tuning import TunedConfig, export, tune

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from accelerate import Accelerator
    from jaxtyping import Float
    from torch import Tensor

    from trainers.backbone import Backbone, Condition
    from trainers.batch import Batch
    from trainers.frozen import Images, Texts


class SdxlLoraConfig(TunedConfig):
    """Denoising loss on captioned pictures; adapters in the attention projections."""

    kind: Literal["sdxl_lora"] = "sdxl_lora"
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Probability that an example is shown without its caption, so that guidance keeps working."""

    @model_validator(mode="after")
    def _only_adapters(self) -> Self:
        if self.lora is None or self.train_text_encoders:
            raise ValueError("sdxl_lora trains adapters alone; for every weight, set kind: dreambooth")
        return self

    @override
    def build(self, seed: int, cache: Path | None, accelerator: Accelerator) -> Method:
        from trainers.cache import Cache
        from trainers.frozen import Frozen, encode_images, encode_texts

        backbone = self.backbone.load(accelerator.device, self.frozen_dtype())
        frozen = Frozen(self.backbone, backbone, Cache(cache) if cache else None, accelerator)
        images = encode_images(frozen, self.data, held_out=self.validation is not None)
        captions = [example.prompt for example in (*images.split.train, *images.split.held_out)]
        texts = encode_texts(frozen, [None, *captions]) if self.text_is_frozen else None
        return SdxlLora(self, seed, backbone, images, texts)


class SdxlLora(Method):
    """A frozen SDXL model with trainable adapters."""

    def __init__(
        self, config: SdxlLoraConfig, seed: int, backbone: Backbone, images: Images, texts: Texts | None
    ) -> None:
        from trainers.denoising import Denoising

        self.config, self.data, self.seed, self.backbone = config, config.data, seed, backbone
        self.batch_size = config.batch_size
        self.examples, self.held_out = images.split.train, images.split.held_out
        self.unreadable = images.split.unreadable
        self._images, self._texts = images, texts
        self._denoising = Denoising(backbone, images, config.loss, seed)
        self._trained = tune(backbone, config, seed)

    @override
    def trained(self) -> Mapping[str, Trained]:
        return self._trained

    @override
    def losses(self, batch: Batch) -> Float[Tensor, " b"]:
        noised = self._denoising.noised(batch)
        prediction = self.backbone.denoise(noised.x_t, noised.t, self.condition(batch))
        return self._denoising.losses(prediction, noised)

    def condition(self, batch: Batch) -> Condition:
        """What the denoiser is told about each row: its caption, unless that is dropped, and its sizes."""
        prompts = self.prompts(batch)
        text = self._texts.select(prompts) if self._texts else self.backbone.encode_prompts(prompts, together=True)
        return self.backbone.condition(text, [self._images.geometries[i] for i in batch.indices])

    def prompts(self, batch: Batch) -> list[str | None]:
        """Each row's caption; None where it is dropped."""
        kept = self._denoising.kept(batch, self.config.caption_dropout)
        return [self.example(i).prompt if keep else None for i, keep in zip(batch.indices, kept, strict=True)]

    @override
    def export(self, folder: Path) -> None:
        export(self.backbone, self._trained, folder)
