"""A small panel that is scored while a trial trains, so that hopeless trials can be ended early."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from trainers.prompt import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch

    from evaluation.config import EvaluateConfig, ReportConfig
    from evaluation.evaluate import Ranks
    from evaluation.metric import Scorer
    from trainers.batch import Source
    from trainers.method import Method
    from trainers.rundir import RunDir


class Reporter:
    """Appends `report` events: the mean of each metric, and its mean for each prompt."""

    def __init__(
        self,
        report: ReportConfig,
        config: EvaluateConfig,
        run: RunDir,
        cache: Path,
        ranks: Ranks,
        autocast: Callable[..., AbstractContextManager[None]],
    ) -> None:
        self._report, self._config, self._run, self._cache = report, config, run, cache
        self._ranks, self._autocast = ranks, autocast
        self._scorers: Mapping[str, Scorer] | None = None
        """Opened when first needed, and kept."""

    def due(self, step: int) -> bool:
        """Whether a report is wanted after so many steps."""
        return step % self._report.every == 0

    def look(self, method: Method, step: int) -> None:
        """Draw and score the panel; ranks share the work."""
        import numpy as np

        from trainers.sampling import generate

        opened = self.scorers(method.held_out, method.backbone.device)
        scorers = {name: one for name, one in opened.items() if not self._config.metrics[name].of_class}
        prompts = self._config.prompts[: self._report.prompts]
        seeds = self._config.seeds[: self._report.seeds]
        requests = [Request(prompt, seed) for prompt in prompts for seed in seeds]
        with self._autocast():
            samples = list(generate(method.model, requests[self._ranks.rank :: self._ranks.world], self._config))
        keys = [(str(sample.prompt), sample.seed) for sample in samples]
        columns = {name: scorer.look(samples) for name, scorer in scorers.items()} if samples else {}
        rows = [(key, {name: column[row] for name, column in columns.items()}) for row, key in enumerate(keys)]
        seen = dict(self._ranks.gather(rows))
        if self._ranks.rank != 0:
            return
        found: dict[tuple[str, int], dict[str, float]] = {(str(one.prompt), one.seed): {} for one in requests}
        for name, scorer in scorers.items():
            values = scorer.judge(requests, np.stack([seen[key][name] for key in found]))
            for key, value in zip(found, values, strict=True):
                found[key][name] = value
        means = {name: [_mean([found[str(p), seed][name] for seed in seeds]) for p in prompts] for name in scorers}
        self._run.append(
            "report", step=step, scores={name: _mean(values) for name, values in means.items()}, prompts=means
        )

    def scorers(self, references: Sequence[Source], device: torch.device) -> Mapping[str, Scorer]:
        """The metrics with their models in memory; for the final evaluation, too."""
        if self._scorers is None:
            from evaluation.evaluate import open_scorers

            self._scorers = open_scorers(self._config, references, device, self._cache)
        return self._scorers


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is defined, as the final scores have it; None, JSON's null, if nothing is."""
    defined = [value for value in values if value is not None and not math.isnan(value)]
    return sum(defined) / len(defined) if defined else None
