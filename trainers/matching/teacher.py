"""The pretrained denoiser beside the one that is trained, and the latents it is asked about."""

from __future__ import annotations

import copy
from abc import abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import PositiveInt
from typing_extensions import override

from trainers.adapters.queries import call_with_queries
from trainers.config import Choice
from trainers.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    import torch
    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from trainers.backbone import Backbone, Condition
    from trainers.cache import Tensors
    from trainers.diffusion import Diffusion
    from trainers.frozen import Frozen, Images


class Teacher:
    """The denoiser as it was before training.

    If adapters are trained, it is the same network with its adapters off and costs no memory. If every weight is, it is
    a copy in the precision of frozen weights: for SDXL 5.1 GB in bfloat16 beside the 10.3 GB of trained ones.
    """

    def __init__(self, backbone: Backbone, *, adapters: bool) -> None:
        """Call this before anything is added to the model.

        Args:
            backbone: As it was loaded.
            adapters: Whether only adapters will be trained.
        """
        self._backbone = backbone
        if not adapters:
            self._backbone = copy.copy(backbone)
            self._backbone.denoiser = copy.deepcopy(backbone.denoiser)

    def queries(
        self, layer: str, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b tokens channels"]:
        """The queries of `layer`, under the caller's autocast and without gradients."""
        import torch

        backbone = self._backbone
        with torch.no_grad(), _adapters_off(backbone.denoiser):
            return call_with_queries(backbone.denoiser, layer, lambda: backbone.denoise(x_t, t, condition))[1]


@contextmanager
def _adapters_off(network: nn.Module) -> Generator[None]:
    """Within the context PEFT's layers are the layers they wrap, of whatever kind their adapters are."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    # Switching adapters off and on also decides what is trainable.
    flags = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)
        for parameter, flag in flags:
            parameter.requires_grad = flag


@dataclass(frozen=True)
class Trajectories:
    """The latents through which the frozen model passes on its way to each picture, in host memory or mapped to it."""

    timesteps: Int[Tensor, " n"]
    """The same for all pictures, rising to the last training timestep."""
    latents: Float[Tensor, "pictures n c h w"]

    def snap(self, t: Int[Tensor, " b"], band: tuple[int, int] | None = None) -> Int[Tensor, " b"]:
        """As far along the trajectories' timesteps in the band as t is along the band: uniform if t is."""
        grid = self.timesteps.to(t.device)
        low, high = band or (0, int(grid[-1]))
        grid = grid[(low <= grid) & (grid <= high)]
        return grid[(t - low) * len(grid) // (high - low + 1)]

    def at(self, pictures: Sequence[int], t: Int[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Each row's latents at its timestep, which is one of the trajectories'."""
        import torch

        return self.latents[list(pictures), torch.searchsorted(self.timesteps, t.cpu())].to(t.device)


class QueryTarget(Choice):
    """Family of `pdm.target` sections: the latents at which the frozen model's queries are read."""

    same: ClassVar[bool] = False
    """Whether they are those that the trained model sees."""

    def check(self, num_timesteps: int, band: tuple[int, int] | None) -> None:
        """Raise ConfigError if there are no latents at so many timesteps of a model, or none in the band."""

    @abstractmethod
    def prepare(self, frozen: Frozen, pictures: Images, conditions: Sequence[Condition]) -> Trajectories | None:
        """Frozen work for the pictures; None if there is none to do.

        Args:
            frozen: With a backbone that nothing was added to.
            pictures: The subject's.
            conditions: What the frozen model is told about each picture, one row each.
        """


class SameLatent(QueryTarget):
    """The latents that the trained model sees: both answer the same question, so the loss begins near zero."""

    same: ClassVar[bool] = True

    kind: Literal["same_latent"] = "same_latent"

    @override
    def prepare(self, frozen: Frozen, pictures: Images, conditions: Sequence[Condition]) -> Trajectories | None:
        return None


class Inverted(QueryTarget):
    """Latents of the picture's DDIM inversion by the frozen model; they are computed once and lie in the cache."""

    kind: Literal["inverted"] = "inverted"
    steps: PositiveInt = 100
    """Denoiser calls per picture, and latents stored: at 512 pixels 65 kB each. A divisor of the model's timesteps;
    training draws only from those at which there is a latent."""

    @override
    def check(self, num_timesteps: int, band: tuple[int, int] | None) -> None:
        if num_timesteps % self.steps:
            raise ConfigError(
                f"train.pdm.target.steps is {self.steps}; expected a divisor of the model's {num_timesteps} timesteps"
            )
        apart = num_timesteps // self.steps
        if band and (band[1] + 1) // apart == band[0] // apart:
            raise ConfigError(
                f"train.pdm.timesteps: none of {self.steps} steps of inversion ends in {list(band)}; expected a wider "
                "band, or more target.steps"
            )

    @override
    def prepare(self, frozen: Frozen, pictures: Images, conditions: Sequence[Condition]) -> Trajectories | None:
        import torch

        from trainers.cache import digest
        from trainers.matching.inversion import invert

        backbone, config = frozen.backbone, frozen.config
        process = cast("Diffusion", backbone.process)
        network = frozen.describe(config.denoiser_files(), backbone.dtype)

        def start(i: int) -> Tensor:
            moments = pictures.select([i], backbone.device)
            return backbone.sample_latents(moments, torch.zeros_like(moments.mean))

        def make(i: int) -> Tensors:
            with torch.no_grad(), frozen.accelerator.autocast():
                path = invert(lambda x, t: backbone.denoise(x, t, conditions[i]), start(i), process, self.steps)
            return {"timesteps": path.timesteps[None], "latents": path.latents[None].cpu()}

        def key(i: int) -> str:
            # What the denoiser is told and starts from is hashed itself; prompt, sizes and picture are behind it.
            told = [start(i), *conditions[i].text.tensors().values(), process.alphas_cumprod]
            told += [conditions[i].sizes] if conditions[i].sizes is not None else []
            return digest("inversion", str(self.steps), process.prediction, network, *(_hash(one) for one in told))

        _, rows = frozen.stack("inverted pictures", key, make, len(conditions))
        return Trajectories(rows["timesteps"][0], rows["latents"])


def _hash(tensor: torch.Tensor | None) -> str:
    import hashlib

    return "" if tensor is None else hashlib.sha256(tensor.detach().float().cpu().numpy().tobytes()).hexdigest()
