"""The `warm_start:` section: what a study tries first, after its own defaults."""

from collections.abc import Iterator, Mapping
from typing import Self

from pydantic import Field, model_validator

from orchestrator.complaints import did_you_mean, shown
from orchestrator.search import Parameter
from orchestrator.yaml import Location
from trainers.config import Config, LocalPath


class WarmStart(Config):
    """Parameters, trials of an earlier study, or both."""

    params: tuple[dict[str, bool | int | float | str | None], ...] = ()
    """Trials by searched path and value; a path that is not said has the template's value."""
    study: LocalPath | None = None
    """Folder of an earlier study; a file of stages may name an earlier one of them, and waits for it. Its scored trials
    are taken over with their results where this study would run the very same trial, and are run again where
    something else differs."""
    best: int | None = Field(default=None, ge=1)
    """Take over its best ones alone, so many, by this study's objective; null takes all."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.params and self.study is None:
            raise ValueError("got neither params nor study; expected one of them, or both")
        if self.best is not None and self.study is None:
            raise ValueError("got best without study; expected the study that it speaks of")
        return self

    def problems(self, search: Mapping[str, Parameter]) -> Iterator[tuple[Location, object, str]]:
        """What of `params` cannot be tried: where, the value, and why."""
        for place, params in enumerate(self.params):
            if not params:
                yield ("params", place), params, "got nothing; expected values by path: the defaults are tried anyway"
            for path, value in params.items():
                if path not in search:
                    hint = did_you_mean(path, search)
                    yield ("params", place, path), value, f"got an unknown path; expected one of search; {hint}"
                elif not search[path].contains(value):
                    message = f"got {shown(value)}; expected a value that the search can reach"
                    yield ("params", place, path), value, message
