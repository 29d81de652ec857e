"""The loss on held-out examples, with the same noise at every evaluation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

from pydantic import PositiveInt

from trainers.batch import Batch
from trainers.config import Config
from trainers.errors import DataError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from trainers.method import Method

_FIRST_PLACE = 1 << 31
"""Place of the first validation row in a batch: no training batch is as large, so no random number is shared."""
_GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples modulo 1 are spread evenly however many there are."""


class ValidationConfig(Config):
    """Evaluate the loss on the examples that `data` holds out. Nothing is dropped, and noise never changes."""

    every: PositiveInt = 100
    """Optimizer steps; the last step is evaluated too."""
    draws: PositiveInt = 8
    """Noise levels an example is judged at, spread evenly over those of training."""


def check_held_out(method: Method) -> None:
    """Find out whether there is anything to validate on.

    Raises:
        DataError: Nothing is held out, or what is has no captions.
    """
    if not method.held_out:
        raise DataError("train.validation: no examples are held out; hold some out (data), or remove validation")
    silent = [example.path for example in method.held_out if not example.prompt]
    if silent:
        raise DataError(
            f"train.validation: {silent[0]} has no caption, as {len(silent)} of {len(method.held_out)} held-out "
            "pictures; hold out captioned pictures, or remove validation"
        )


def validation_batches(method: Method, draws: int, size: int) -> list[Batch]:
    """Every held-out example at `draws` noise levels, in batches of at most `size` rows of one shape."""
    first = len(method.examples)
    rows = [(h, draw) for h in range(len(method.held_out)) for draw in range(draws)]
    levels = [(draw + (0.5 + h * _GOLDEN) % 1) / draws for h, draw in rows]
    alike: dict[tuple[int, int] | None, list[int]] = {}
    for row, (h, _) in enumerate(rows):
        alike.setdefault(method.held_out[h].size, []).append(row)
    chosen = (group[start : start + size] for group in alike.values() for start in range(0, len(group), size))
    return [
        Batch(
            step=0,
            places=tuple(_FIRST_PLACE + row for row in batch),
            indices=tuple(first + rows[row][0] for row in batch),
            levels=tuple(levels[row] for row in batch),
        )
        for batch in chosen
    ]


def validate(method: Method, config: ValidationConfig, size: int, accelerator: Accelerator) -> float:
    """Mean loss over the held-out examples; processes share the work.

    Args:
        method: With its networks in evaluation mode.
        config: How many noise levels.
        size: Examples per forward pass, the same in all processes.
        accelerator: This process's device, precision and peers.
    """
    import torch

    total = torch.zeros((), device=accelerator.device)
    batches = validation_batches(method, config.draws, size)
    with torch.no_grad(), accelerator.autocast():
        for batch in batches[accelerator.process_index :: accelerator.num_processes]:
            total += method.losses(batch).sum()
    total = cast("Tensor", accelerator.reduce(total, reduction="sum"))
    return float(total) / (len(method.held_out) * config.draws)
