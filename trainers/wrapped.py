"""A model that tells a backbone more than words; pictures are the backbone's own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from typing_extensions import override

from trainers.backbone import Backbone, Model

if TYPE_CHECKING:
    from collections.abc import Generator

    from jaxtyping import Float
    from torch import Tensor

    from trainers.backbone import SchedulerName

B = TypeVar("B", bound=Backbone)


class Wrapped(Model, Generic[B]):
    """What does not depend on what else is told."""

    def __init__(self, backbone: B) -> None:
        self.backbone, self.device = backbone, backbone.device
        self.scale = 1.0
        """How strongly adapters act at present."""

    @override
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.backbone.latent_shape(height, width)

    @override
    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        return self.backbone.decode(latents)

    @override
    def sampling_scheduler(self, name: SchedulerName) -> Any:
        return self.backbone.sampling_scheduler(name)

    @override
    @contextmanager
    def adapter_scale(self, scale: float) -> Generator[None]:
        previous, self.scale = self.scale, scale
        try:
            with self.backbone.adapter_scale(scale):
                yield
        finally:
            self.scale = previous
