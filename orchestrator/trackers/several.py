"""More than one tracker: what a list under `tracker:` means."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import Field
from typing_extensions import override

from orchestrator.tracker import StudyView, Tracker, TrialView
from trainers.errors import TrackerError


class SeveralTrackers(Tracker):
    """Mirrors the study to each; one that is down does not keep the others back."""

    kind: Literal["several"] = "several"
    trackers: Annotated[tuple[Tracker, ...], Field(min_length=1)]

    @override
    def mirror(self, study: StudyView, trials: Sequence[TrialView]) -> None:
        problems: list[str] = []
        for tracker in self.trackers:
            try:
                tracker.mirror(study, trials)
            except TrackerError as error:
                problems.append(str(error))
        if problems:
            raise TrackerError("; ".join(problems))

    @override
    def serve(self, name: str, root: Path, port: int, say: Callable[[str], None]) -> None:
        """The first one's pages."""
        first, *others = (tracker.model_dump()["kind"] for tracker in self.trackers)
        if others:
            say(f"Showing {first}; `--set tracker.kind={others[0]}` shows {others[0]}.")
        self.trackers[0].serve(name, root, port, say)


def several(value: object) -> object:
    """What a study file says under `tracker:`, where a list stands for this kind."""
    return {"kind": "several", "trackers": cast("list[object]", value)} if isinstance(value, list) else value
