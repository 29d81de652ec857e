"""SIGTERM while a model is trained: a scheduler's word that the machine is needed, or that time is short."""

import signal
from types import FrameType
from typing import Any, Self, cast

import torch
from accelerate import Accelerator


class Notice:
    """Within the context SIGTERM ends nothing: it is noted, and heeded after a step.

    A second SIGTERM does as the first, so what sends it must know how to kill.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._received = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def given(self) -> bool:
        """Whether any rank was told to end; all ranks must ask, and all get the same answer."""
        if self._accelerator.num_processes == 1:
            return self._received
        told = torch.tensor(float(self._received), device=self._accelerator.device)
        return bool(cast("torch.Tensor", self._accelerator.reduce(told, reduction="sum")) > 0)

    def _receive(self, _signal: int, _frame: FrameType | None) -> None:
        self._received = True
