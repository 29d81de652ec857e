"""DreamBooth (Ruiz et al., 2023, arXiv:2208.12242): a few pictures of a subject, and the class it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator
from typing_extensions import override

from trainers.batch import shuffled
from trainers.method import Method, Trained
from trainers.prior import PriorConfig
from trainers.tuning import TunedConfig, export, tune

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from accelerate import Accelerator
    from jaxtyping import Float
    from torch import Tensor

    from trainers.backbone import Backbone
    from trainers.batch import Batch
    from trainers.frozen import Images, Texts


class DreamboothConfig(TunedConfig):
    """Pictures of a subject under one prompt; adapters or every weight; prior preservation if wanted."""

    kind: Literal["dreambooth"] = "dreambooth"
    prior: PriorConfig | None = None
    """Pictures of the class, which make up half of every batch; null trains on the subject alone."""

    @model_validator(mode="after")
    def _halves(self) -> Self:
        if self.prior and self.batch_size % 2:
            raise ValueError(
                f"batch_size is {self.batch_size}; with a prior half of every batch is class pictures: expected an "
                "even number"
            )
        if self.prior and len(self.data.sizes) > 1:
            raise ValueError("prior with data.buckets: class pictures are drawn square; remove one of them")
        return self

    @override
    def check(self) -> None:
        super().check()
        if self.prior:
            self.prior.check(self.data, self.backbone)

    @override
    def build(self, seed: int, cache: Path | None, accelerator: Accelerator) -> Method:
        from trainers.cache import Cache
        from trainers.frozen import Frozen, encode_images, encode_texts

        backbone = self.backbone.load(accelerator.device, self.frozen_dtype())
        frozen = Frozen(self.backbone, backbone, Cache(cache) if cache else None, accelerator)
        images = encode_images(frozen, self.data, held_out=self.validation is not None)
        subject = len(images.split.train)
        if self.prior:
            images = images.joined(self.prior.encode(frozen, self.data.size[0]))
        captions = [example.prompt for example in (*images.split.train, *images.split.held_out)]
        texts = encode_texts(frozen, captions) if self.text_is_frozen else None
        return Dreambooth(self, seed, backbone, (images, subject), texts)


class Dreambooth(Method):
    """A pretrained model that learns a subject."""

    def __init__(
        self,
        config: DreamboothConfig,
        seed: int,
        backbone: Backbone,
        pictures: tuple[Images, int],
        texts: Texts | None,
    ) -> None:
        from trainers.denoising import Denoising

        self._images, self._num_subject = pictures
        self.config, self.data, self.seed, self.backbone = config, config.data, seed, backbone
        self.batch_size = config.batch_size
        self.examples, self.held_out = self._images.split.train, self._images.split.held_out
        self.unreadable = self._images.split.unreadable
        self._texts = texts
        self._denoising = Denoising(backbone, self._images, config.loss, seed)
        self._trained = tune(backbone, config, seed)

    @override
    def trained(self) -> Mapping[str, Trained]:
        return self._trained

    @override
    def pick(self, step: int, position: int) -> int:
        subject = self.examples[: self._num_subject]
        if self.config.prior is None:
            return self.data.pick(subject, self.seed, step, position, self.batch_size)
        place, is_class = divmod(position, 2)
        if is_class:
            return self._num_subject + shuffled(self.seed, len(self.examples) - self._num_subject, place)
        return self.data.pick(subject, self.seed, step, place, self.batch_size // 2)

    @override
    def losses(self, batch: Batch) -> Float[Tensor, " b"]:
        noised = self._denoising.noised(batch)
        prompts = [self.example(i).prompt for i in batch.indices]
        text = self._texts.select(prompts) if self._texts else self.backbone.encode_prompts(prompts, together=True)
        condition = self.backbone.condition(text, [self._images.geometries[i] for i in batch.indices])
        losses = self._denoising.losses(self.backbone.denoise(noised.x_t, noised.t, condition), noised)
        return losses * losses.new_tensor([self._weight(i) for i in batch.indices])

    def _weight(self, index: int) -> float:
        """Such that the mean over a batch is the subject's mean loss plus the weight times the class's."""
        if self.config.prior is None or index >= len(self.examples):
            return 1.0
        return 2.0 * self.config.prior.weight if self._is_class(index) else 2.0

    def _is_class(self, index: int) -> bool:
        return self._num_subject <= index < len(self.examples)

    @override
    def export(self, folder: Path) -> None:
        export(self.backbone, self._trained, folder)
