"""The bridge from a study's sampler to Optuna's."""

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial
from typing_extensions import override

from orchestrator.search import Parameter, Sampler, Value


class DrawingSampler(optuna.samplers.BaseSampler):
    """Draws all of a trial's values at once, so that a kill between two of them changes nothing.

    It keeps no state. The first trials are given: the study's own defaults, and what it is warm-started with.
    """

    def __init__(self, sampler: Sampler, space: Mapping[str, Parameter], first: Sequence[Mapping[str, Value]]) -> None:
        self._sampler = sampler
        self._space = space
        self._first = first

    @override
    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: parameter.distribution() for name, parameter in self._space.items()}

    @override
    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if trial.number < len(self._first):
            return dict(self._first[trial.number])
        return self._sampler.draw(self._space, study, trial)

    @override
    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError(f"{param_name} is not searched")
