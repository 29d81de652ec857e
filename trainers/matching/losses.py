"""The query-matching loss: one attention layer is to ask what it asked before training."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Self

from pydantic import NonNegativeInt, PositiveFloat, model_validator

from trainers.adapters.queries import choose_layer
from trainers.config import Config
from trainers.errors import ConfigError, ModelError
from trainers.matching.masks import shrink
from trainers.matching.teacher import QueryTarget, SameLatent, Teacher

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from jaxtyping import Float
    from torch import Tensor

    from trainers.backbone import Condition
    from trainers.denoising import Noised
    from trainers.frozen import Frozen, Images


class PdmConfig(Config):
    """The query-matching loss on the subject's pictures."""

    weight: PositiveFloat = 1.0
    """Factor of the loss."""
    target: QueryTarget = SameLatent()
    """The latents at which the untrained model's queries are read."""
    prompt: str | None = None
    """What the untrained model is told, such as "a photo of a dog"; null is the picture's own caption."""
    timesteps: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """First and last training timestep to match at; null is all of the model's."""
    layer: str | None = None
    """An attention layer of the UNet; null is the last self-attention of the last upward block that has any."""
    masked: bool = False
    """Count distances on the subject alone."""

    @model_validator(mode="after")
    def _band_is_not_empty(self) -> Self:
        if self.timesteps and self.timesteps[0] > self.timesteps[1]:
            raise ValueError(f"timesteps are {self.timesteps}; expected the smaller one first")
        return self

    def check(self, num_timesteps: int) -> None:
        """Raise ConfigError if queries cannot be matched at these timesteps of a model that has so many."""
        if self.timesteps and self.timesteps[1] >= num_timesteps:
            raise ConfigError(
                f"train.pdm.timesteps: the last is {self.timesteps[1]}; expected at most {num_timesteps - 1}, the "
                "model's last"
            )
        self.target.check(num_timesteps, self.timesteps)


class QueryMatching:
    """The untrained model's queries of the subject's pictures, and how far others are from them."""

    layer: str
    """The attention layer's name in the denoiser."""

    def __init__(self, config: PdmConfig, frozen: Frozen, pictures: Images, *, adapters: bool) -> None:
        """Do the frozen work; call this before anything is added to the model.

        Args:
            config: What to match.
            frozen: With the backbone as it was loaded.
            pictures: The subject's.
            adapters: Whether only adapters of the denoiser will be trained.
        """
        from trainers.frozen import encode_texts

        self._config, self._backbone, self._geometries = config, frozen.backbone, pictures.geometries
        self._prompts = [config.prompt if config.prompt is not None else one.prompt for one in pictures.split.train]
        self._texts = encode_texts(frozen, self._prompts)
        self.layer = choose_layer(config.layer, [name for name, _ in frozen.backbone.denoiser.named_parameters()])
        self._teacher = Teacher(frozen.backbone, adapters=adapters)
        conditions = [self._told([i]) for i in range(len(self._prompts))]
        self._trajectories = config.target.prepare(frozen, pictures, conditions)

    def redrawn(self, noised: Noised, rows: Sequence[int], rngs: Sequence[torch.Generator]) -> Noised:
        """`noised` with the timesteps of `rows` drawn from those at which queries are matched.

        Args:
            noised: A batch.
            rows: The batch's rows that queries are compared of.
            rngs: For each row of the batch, the generator that its timestep was drawn with, from its beginning.
        """
        if self._config.timesteps is None and self._trajectories is None:
            return noised
        import torch

        process, t = self._backbone.process, noised.t.clone()
        drawn = torch.stack([process.draw_t(rngs[row], self._config.timesteps) for row in rows])
        t[list(rows)] = (self._trajectories.snap(drawn, self._config.timesteps) if self._trajectories else drawn).to(t)
        x_t, target = (make(noised.x0, noised.noise, t) for make in (process.add_noise, process.target))
        return replace(noised, t=t, x_t=x_t, target=target)

    def targets(self, noised: Noised, rows: Sequence[int], pictures: Sequence[int]) -> Float[Tensor, "b tokens c"]:
        """The untrained model's queries.

        Args:
            noised: A batch, `redrawn`.
            rows: The batch's rows that are compared.
            pictures: The subject's picture in each of them.
        """
        t, x_t = noised.t[list(rows)], noised.x_t[list(rows)]
        if self._trajectories:
            x_t = self._trajectories.at(pictures, t)
        return self._teacher.queries(self.layer, x_t, t, self._told(pictures))

    def _told(self, pictures: Sequence[int]) -> Condition:
        text = self._texts.select([self._prompts[i] for i in pictures])
        return self._backbone.condition(text, [self._geometries[i] for i in pictures])


def query_losses(
    queries: Float[Tensor, "b tokens c"], targets: Float[Tensor, "b tokens c"], masks: Float[Tensor, "b 1 h w"]
) -> Float[Tensor, " b"]:
    """Mean squared distance over channels, and over tokens by their share of the mask.

    Args:
        queries: Of a layer whose tokens are the latents or, in each direction, every second, fourth … of them.
        targets: What they are to be.
        masks: Of the latents; not zero everywhere.

    Raises:
        ModelError: The tokens are no grid of the latents' shape.
    """
    weights = shrink(masks, _grid(queries.shape[1], masks.shape[2], masks.shape[3])).flatten(1)
    distances = (queries.float() - targets.float()).square().mean(-1)
    return (distances * weights).sum(1) / weights.sum(1)


def _grid(num_tokens: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of the latents where a UNet has halved them, rounding up, until so many are left."""
    rows, columns = height, width
    while rows * columns > num_tokens and (rows, columns) != (1, 1):
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    if rows * columns != num_tokens:
        raise ModelError(
            f"a layer with {num_tokens} tokens for {height} x {width} latents; expected one for 1, 2, 4 … of them "
            "in each direction: name another layer"
        )
    return rows, columns
