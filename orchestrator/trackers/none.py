"""No tracker: the run directories and `status` are enough."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from typing_extensions import override

from orchestrator.tracker import StudyView, Tracker, TrialView
from trainers.errors import ConfigError


class NoTracker(Tracker):
    """Mirrors nothing."""

    kind: Literal["none"] = "none"

    @override
    def mirror(self, study: StudyView, trials: Sequence[TrialView]) -> None:
        """Nothing to do."""

    @override
    def serve(self, name: str, root: Path, port: int, say: Callable[[str], None]) -> None:
        raise ConfigError(
            f"tracker: study {name!r} has kind 'none', which has no pages to show; expected kind 'mlflow'"
        )
