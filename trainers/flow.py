"""Flow matching: latents become noise along straight lines, and the network learns the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from typing_extensions import override

from trainers.diffusion import NoiseProcess

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from trainers.loss import Prediction


@dataclass(frozen=True)
class Flow(NoiseProcess):
    """Rectified flow (Liu et al., 2022, arXiv:2209.03003): x_t = (1 - sigma) x0 + sigma noise.

    A timestep is what the network is told: sigma times the number of timesteps, not necessarily a whole number.
    """

    shift: float
    """How far timesteps lean towards noise: u becomes shift u / (1 + (shift - 1) u) (Esser et al., 2024,
    arXiv:2403.03206, equation 23)."""
    num_timesteps: int = 1000  # what all released flow models were trained with
    prediction: Prediction = "flow"

    @override
    def timestep(self, index: Int[Tensor, ""]) -> Float[Tensor, ""]:
        """A timestep of `FlowMatchEulerDiscreteScheduler`'s table."""
        u = (index + 1) / self.num_timesteps
        return self.shift * u / (1 + (self.shift - 1) * u) * self.num_timesteps

    @override
    def add_noise(
        self, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Float[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        sigma = self._sigma(t).view(-1, 1, 1, 1)
        return (1 - sigma) * x0 + sigma * noise

    @override
    def target(
        self, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Float[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """The line's direction, whatever the timestep: noise - x0."""
        return noise - x0

    @override
    def snr(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        sigma = self._sigma(t)
        return ((1 - sigma) / sigma).square()

    def _sigma(self, t: Tensor) -> Float[Tensor, " b"]:
        return t.float() / self.num_timesteps


class FlowEuler(FlowMatchEulerDiscreteScheduler):
    """diffusers' sampler, with the two members that its other samplers have: flows need no scaling."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The sample as it is."""
        del timestep
        return sample
