"""LoRA of SDXL's UNet and, if wanted, of its text encoders, on captioned pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import Field, PositiveFloat
from typing_extensions import override

from trainers.adapters.lora import (
    TEXT_TARGETS,
    UNET_TARGETS,
    LoraConfig,
    TextEncoderLoraConfig,
    add_lora,
    save_lora,
)
from trainers.method import Method, MethodConfig, Stream, Trained, example_rng

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from accelerate import Accelerator
    from jaxtyping import Float
    from torch import Tensor

    from trainers.backbone import Backbone, Condition
    from trainers.batch import Batch
    from trainers.frozen import Images, Texts


class SdxlLoraConfig(MethodConfig):
    """Denoising loss on captioned pictures; adapters in the attention projections."""

    kind: Literal["sdxl_lora"] = "sdxl_lora"
    lora: LoraConfig = LoraConfig()
    """Of the UNet."""
    text_encoder_lora: TextEncoderLoraConfig | None = None
    """Null leaves the text encoders as they are; their work is then done once and cached."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Probability that an example is shown without its caption, so that guidance keeps working."""
    min_snr_gamma: PositiveFloat | None = None
    """Clamp of the min-SNR loss weight; null is the plain mean squared error."""

    @override
    def num_trainable(self) -> int:
        shapes = self.backbone.weight_shapes()
        adapted = [("unet", UNET_TARGETS, self.lora.rank)]
        if text := self.text_encoder_lora:
            adapted += [(name, TEXT_TARGETS, text.rank) for name in shapes if name.startswith("text_encoder")]
        return sum(
            rank * sum(shape)
            for network, targets, rank in adapted
            for name, shape in shapes[network].items()
            if name.endswith(tuple(f".{target}.weight" for target in targets))
        )

    @override
    def build(self, seed: int, cache: Path | None, accelerator: Accelerator) -> Method:
        from trainers.cache import Cache
        from trainers.frozen import Frozen, encode_images, encode_texts

        backbone = self.backbone.load(accelerator.device, self.frozen_dtype())
        frozen = Frozen(self.backbone, backbone, Cache(cache) if cache else None, accelerator)
        images = encode_images(frozen, self.data)
        captions = [example.prompt for example in images.split.train]
        texts = None if self.text_encoder_lora else encode_texts(frozen, [None, *captions])
        return SdxlLora(self, seed, backbone, images, texts)


class SdxlLora(Method):
    """A frozen SDXL base model with trainable adapters."""

    def __init__(
        self, config: SdxlLoraConfig, seed: int, backbone: Backbone, images: Images, texts: Texts | None
    ) -> None:
        self.config, self.seed, self.backbone = config, seed, backbone
        self.examples, self.held_out = images.split.train, images.split.held_out
        self.unreadable = images.split.unreadable
        self._images, self._texts = images, texts
        add_lora(backbone.denoiser, config.lora, UNET_TARGETS, _init_seed(seed, 0))
        self._trained = {"unet": Trained(backbone.denoiser)}
        if not (text := config.text_encoder_lora):
            return
        last = len(backbone.text_encoders) - 1
        for i, encoder in enumerate(backbone.text_encoders):
            # Of the encoders before the last only penultimate states are used, so their last layer learns nothing.
            layers = cast("Any", encoder).config.num_hidden_layers - (i != last)
            add_lora(encoder, text, TEXT_TARGETS, _init_seed(seed, i + 1), layers)
            name = "text_encoder" if i == 0 else f"text_encoder_{i + 1}"
            self._trained[name] = Trained(encoder, text.lr_scale)

    @override
    def trained(self) -> Mapping[str, Trained]:
        return self._trained

    @override
    def losses(self, batch: Batch) -> Float[Tensor, " b"]:
        import torch

        backbone, process = self.backbone, self.backbone.process
        moments = self._images.select(batch.indices, backbone.device)
        shape = moments.mean.shape[1:]

        def normal(stream: Stream) -> Tensor:
            drawn = [torch.randn(shape, generator=rng) for rng in self._rngs(batch, stream)]
            return torch.stack(drawn).to(backbone.device, non_blocking=True)

        x0 = backbone.sample_latents(moments, normal(Stream.VAE))
        noise = normal(Stream.NOISE)
        steps = [torch.randint(process.num_timesteps, (), generator=rng) for rng in self._rngs(batch, Stream.TIMESTEP)]
        t = torch.stack(steps).to(backbone.device, non_blocking=True)
        prediction = backbone.denoise(process.add_noise(x0, noise, t), t, self.condition(batch))
        losses = (prediction.float() - process.target(x0, noise, t)).square().mean(dim=(1, 2, 3))
        if self.config.min_snr_gamma is not None:
            losses = losses * process.min_snr_weight(t, self.config.min_snr_gamma)
        weights = [self.examples[i].weight for i in batch.indices]
        return losses * torch.tensor(weights, device=losses.device)

    def condition(self, batch: Batch) -> Condition:
        """What the denoiser is told about each row: its caption, unless that is dropped, and its sizes."""
        prompts = self.prompts(batch)
        text = self._texts.select(prompts) if self._texts else self.backbone.encode_prompts(prompts, together=True)
        return self.backbone.condition(text, [self._images.geometries[i] for i in batch.indices])

    def prompts(self, batch: Batch) -> list[str | None]:
        """Each row's caption; None where it is dropped."""
        import torch

        kept = [
            float(torch.rand((), generator=rng)) >= self.config.caption_dropout
            for rng in self._rngs(batch, Stream.DROPOUT)
        ]
        return [self.examples[i].prompt if keep else None for i, keep in zip(batch.indices, kept, strict=True)]

    @override
    def export(self, folder: Path) -> None:
        save_lora(folder, {name: trained.network for name, trained in self._trained.items()})

    def _rngs(self, batch: Batch, stream: Stream) -> list[Any]:
        return [example_rng(self.seed, batch.step, place, stream) for place in batch.places]


def _init_seed(seed: int, network: int) -> int:
    import numpy as np

    return int(np.random.SeedSequence((seed, network)).generate_state(1, np.uint64)[0])
