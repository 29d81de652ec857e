"""Optuna's storage for the one process that may change a study.

Optuna reads every unfinished trial again whenever it is asked for trials, because others may have changed them: with
hundreds in flight that is most of what a controller does. Who holds a study knows what has changed: what it wrote.
"""

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage  # pyright: ignore[reportPrivateUsage]
from optuna.trial import FrozenTrial, TrialState
from typing_extensions import override


class HeldStorage(_CachedStorage):
    """Reads a trial again only if it was written since it was read."""

    def __init__(self, backend: RDBStorage) -> None:
        super().__init__(backend)
        self._written: set[int] = set()
        self._newest = -1
        """Largest id of a trial that was read; all below it were."""

    @override
    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        known = self._studies.get(study_id)
        if known is not None and self._newest >= 0:
            if not self._written:
                return
            # What the base class reads again: these, and all above.
            known.unfinished_trial_ids = set(self._written)
            known.last_finished_trial_id = self._newest
        super()._read_trials_from_remote_storage(study_id)
        self._newest = max(self._trial_id_to_study_id_and_number, default=-1)
        self._written.clear()

    @override
    def get_trial(self, trial_id: int) -> FrozenTrial:
        if trial_id > self._newest or trial_id in self._written:
            return self._backend.get_trial(trial_id)
        study_id, number = self._trial_id_to_study_id_and_number[trial_id]
        return self._studies[study_id].trials[number]

    @override
    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id = super().create_new_trial(study_id, template_trial)
        self._written.add(trial_id)
        return trial_id

    @override
    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        self._written.add(trial_id)
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)

    @override
    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        self._written.add(trial_id)
        return super().set_trial_state_values(trial_id, state, values)

    @override
    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        self._written.add(trial_id)
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)

    @override
    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._written.add(trial_id)
        super().set_trial_user_attr(trial_id, key, value)

    @override
    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._written.add(trial_id)
        super().set_trial_system_attr(trial_id, key, value)
