"""Pictures that are drawn while a model is trained, to look at."""

from __future__ import annotations

from itertools import product
from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from trainers.guidance import SamplingConfig
from trainers.prompt import Prompt, Request, Seed


class SamplesConfig(SamplingConfig):
    """Draw the same pictures every so many steps."""

    every: PositiveInt
    """Optimizer steps; the last step is drawn too."""
    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """Of the initial noise; each prompt is drawn with each."""

    @model_validator(mode="after")
    def _all_differ(self) -> Self:
        if len(set(self.prompts)) < len(self.prompts) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a prompt or a seed is listed twice; the same picture would be drawn twice")
        return self

    def files(self) -> dict[Request, str]:
        """Every picture and the name of its file, prompt after prompt."""
        wanted = product(enumerate(self.prompts), self.seeds)
        return {Request(prompt, seed): f"{place:02d}_{seed}.png" for (place, prompt), seed in wanted}
