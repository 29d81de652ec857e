"""Deterministic noising: the latents through which a frozen model itself passes on its way to a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from trainers.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor

    from trainers.diffusion import Diffusion


@dataclass(frozen=True)
class Trajectory:
    """A picture's latents at rising timesteps."""

    timesteps: Int[Tensor, " n"]
    latents: Float[Tensor, "n c h w"]
    """Row i is noised to `timesteps[i]`."""


def invert(
    predict: Callable[[Tensor, Tensor], Tensor], x0: Float[Tensor, "1 c h w"], process: Diffusion, num_steps: int
) -> Trajectory:
    """Follow DDIM backwards, from a picture to noise (Song et al., 2021, arXiv:2010.02502, section 4.3).

    Without guidance and with eta 0. Steps end at the last training timestep; with as many steps as timesteps there is
    one latent for each. Sampling with DDIM from the last latent comes back to the picture, the closer the more steps.

    Args:
        predict: The denoiser's raw output for (x_t [1 c h w], t [1]).
        x0: Latents of the picture, scaled to what the denoiser expects.
        process: What the denoiser was trained with.
        num_steps: A divisor of the number of training timesteps.

    Raises:
        ConfigError: The number of training timesteps is not a multiple of `num_steps`.
    """
    import torch

    scheduler = _scheduler(process, num_steps)
    latents: list[Tensor] = []
    x = x0.float()
    with torch.no_grad():
        for t in cast("list[int]", scheduler.timesteps.tolist()):
            output = predict(x, torch.full((1,), t, device=x.device)).float()
            x = scheduler.step(output, t, x, return_dict=False)[0]
            latents.append(x)
    return Trajectory(scheduler.timesteps, torch.cat(latents))


def _scheduler(process: Diffusion, num_steps: int) -> Any:
    from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler

    if process.num_timesteps % num_steps:
        raise ConfigError(
            f"{num_steps} steps of inversion; expected a divisor of the model's {process.num_timesteps} timesteps, "
            "so that all steps are alike"
        )
    scheduler: Any = DDIMInverseScheduler(
        num_train_timesteps=process.num_timesteps,
        prediction_type=cast("Any", process.prediction),
        clip_sample=False,  # latents are not confined to [-1, 1]
        set_alpha_to_one=True,  # the picture itself is free of noise
        timestep_spacing="trailing",
    )
    scheduler.alphas_cumprod = process.alphas_cumprod.cpu()
    scheduler.set_timesteps(num_steps)
    return scheduler
