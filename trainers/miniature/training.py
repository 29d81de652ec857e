"""The training loop that the denoisers of the miniature family share; it outlives an interruption."""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

log = logging.getLogger(__name__)
_SAVE_EVERY = 250


@dataclass(frozen=True)
class Schedule:
    """How long a denoiser trains, from which seed, and where its state is kept."""

    steps: int
    seed: int
    checkpoint: Path
    rate: float = 1e-3
    """Highest learning rate of a one-cycle schedule."""


def train(name: str, modules: Sequence[nn.Module], loss: Callable[[random.Random], Tensor], schedule: Schedule) -> None:
    """Minimise `loss`; leaves moving averages of the weights, frozen and in evaluation mode.

    It goes on from `schedule.checkpoint` if it was interrupted, and removes it at the end.

    Args:
        name: What the log calls it.
        modules: All that is trained.
        loss: The loss of one random batch, drawn from torch's generator and from the generator for words it is given;
            both are seeded anew at each step.
        schedule: Steps, seed and checkpoint.
    """
    for module in modules:
        module.train().requires_grad_(True)
    weights = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=schedule.rate, weight_decay=0.01, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.rate, total_steps=schedule.steps, pct_start=0.05)
    average = EMAModel(weights, decay=0.999)
    state = _State(weights, optimizer, rate, average)
    for step in range(state.restore(schedule.checkpoint), schedule.steps):
        torch.manual_seed(schedule.seed * 1_000_003 + step)
        found = loss(random.Random(f"{schedule.seed}/{step}"))
        descend(found, optimizer, rate)
        average.step(weights)
        if step % 100 == 0 or step == schedule.steps - 1:
            log.info("%s step %d loss %.4f", name, step, found.item())
        if (step + 1) % _SAVE_EVERY == 0:
            state.save(schedule.checkpoint, step + 1)
    average.copy_to(weights)
    schedule.checkpoint.unlink(missing_ok=True)
    for module in modules:
        module.eval().requires_grad_(False)


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, rate: torch.optim.lr_scheduler.LRScheduler) -> None:
    """One step of the optimizer and of its schedule, with gradients clipped to norm 1."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    rate.step()


@dataclass(frozen=True)
class _State:
    """Everything that must outlive an interruption; randomness is a function of the step."""

    weights: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    rate: torch.optim.lr_scheduler.LRScheduler
    average: EMAModel

    def save(self, path: Path, step: int) -> None:
        state: dict[str, Any] = {
            "step": step,
            "weights": [p.detach() for p in self.weights],
            "average": self.average.state_dict(),
        }
        state |= {"optimizer": self.optimizer.state_dict(), "rate": self.rate.state_dict()}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def restore(self, path: Path) -> int:
        if not path.exists():
            return 0
        state = torch.load(path, weights_only=True)
        with torch.no_grad():
            for parameter, value in zip(self.weights, state["weights"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.rate.load_state_dict(state["rate"])
        self.average.load_state_dict(state["average"])
        return state["step"]
