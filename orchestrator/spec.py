"""What a study file says, and what one trial of it is."""

import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Never, Self, cast

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

import orchestrator.golden_section  # noqa: F401  # pyright: ignore[reportUnusedImport]  registers the kind
import trainers.methods  # noqa: F401  # pyright: ignore[reportUnusedImport]  registers the kinds
from evaluation.config import EvaluateConfig, ReportConfig
from orchestrator.complaints import complaint, config_error, did_you_mean, shown
from orchestrator.database import DatabaseUrl, sqlite_url
from orchestrator.launcher import Launcher
from orchestrator.launchers.local import LocalLauncher
from orchestrator.limits import Limits
from orchestrator.objective import Objective
from orchestrator.pruners import NoPruner, Pruner
from orchestrator.search import Parameter, Sampler, TpeSampler, Value
from orchestrator.tracker import Tracker
from orchestrator.trackers.mlflow import MlflowTracker
from orchestrator.trackers.several import several
from orchestrator.warm_start import WarmStart
from orchestrator.yaml import Document, Location, Tree, load
from trainers.config import Config, LocalPath
from trainers.errors import ConfigError
from trainers.method import MethodConfig

_MAX_CORNERS = 256


class TrialSpec(Config):
    """Everything that determines a trial's result; frozen into its run directory before it starts."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """All randomness of training follows from it."""
    train: MethodConfig
    evaluate: EvaluateConfig
    adapter: LocalPath | None = None
    """A finished adapter to draw with, its weak version in `weak/`; nothing is trained then, and `train` says of what
    model, method and size it is. null trains."""
    report: ReportConfig | None = None
    """A small panel that is scored while the trial trains, for the study's pruner; null scores none."""

    @model_validator(mode="after")
    def _guidance_finds_its_versions(self) -> Self:
        self.train.check_guidance(self.evaluate.guidance, finished=self.adapter is not None)
        if self.report and self.adapter is None and self.evaluate.guidance.needs_weak:
            raise ValueError(
                "evaluate.guidance.weak is checkpoint, which does not exist while training goes on, and report draws "
                "then; set it to base, or report to null"
            )
        return self


class StudySpec(Config):
    """One study file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    output: LocalPath = Field(default_factory=lambda: Path.cwd() / "runs")
    """Studies and what they share are written below it."""
    trial: TrialSpec
    """The template, and the first trial."""
    search: dict[str, Parameter] = Field(default_factory=dict[str, Parameter])
    """Dotted path into the trial to the values it may take; a path with null is not searched, and without any there
    is one trial."""
    warm_start: WarmStart | None = None
    """What is tried after the defaults and before the sampler has its say; null is nothing."""
    sampler: Sampler = TpeSampler()
    pruner: Pruner = NoPruner()
    objective: Objective
    launcher: Launcher = LocalLauncher()
    tracker: Annotated[Tracker, BeforeValidator(several)] = MlflowTracker()
    """One, or a list."""
    storage: DatabaseUrl | None = None
    """Where trials and their values are kept; null is `study.db` in the study's folder."""
    limits: Limits = Limits()
    confirm_seeds: int = Field(default=4, ge=0)
    """Fresh seeds per prompt on which the best trials, the defaults and the base are compared at the end; 0 is no
    comparison."""
    confirm_top: int = Field(default=3, ge=1)
    """How many of the best trials are scored again on fresh seeds; the best of them there wins."""

    @field_validator("search", mode="before")
    @classmethod
    def _null_is_not_searched(cls, data: Any, info: ValidationInfo) -> Any:
        if data is None:
            return {}
        if not isinstance(data, dict):
            return data
        search, trial = cast("Tree", data), info.data.get("trial")
        if isinstance(trial, TrialSpec):
            tree = trial.model_dump(mode="json")
            for path in (path for path, parameter in search.items() if parameter is None):
                try:
                    _owner(tree, path)
                except ConfigError as error:
                    raise ValueError(f"{path}: {error}") from error
        return {path: parameter for path, parameter in search.items() if parameter is not None}

    @property
    def root(self) -> Path:
        """Everything that belongs to this study alone."""
        return self.output / self.name

    @property
    def cache(self) -> Path:
        """Frozen work that all studies share."""
        return self.output / "cache"

    @property
    def shares_training(self) -> bool:
        """Whether all trials train the same: it is then done once, and every trial only draws and scores."""
        return self.trial.adapter is None and not self._searches_training

    @property
    def _searches_training(self) -> bool:
        return any(path.split(".")[0] in {"train", "seed"} for path in self.search)

    @property
    def trainings(self) -> Path:
        """What trials have trained for one another, in all studies."""
        return self.cache / "trained"

    @property
    def database_url(self) -> str:
        """Where trials and their values are kept."""
        return self.storage or sqlite_url(self.root / "study.db")

    @property
    def num_trials(self) -> int:
        """Counted trials until the study is finished."""
        if not self.search:
            return 1
        size = self.sampler.size(self.search)
        return self.limits.trials if size is None else min(size, self.limits.trials)

    def defaults(self) -> dict[str, Value]:
        """The template's value of every searched path."""
        tree = self.trial.model_dump(mode="json")
        return {path: get_value(tree, path) for path in self.search}

    def resolve(self, params: Mapping[str, Value]) -> TrialSpec:
        """The trial that `params` (dotted path to value) describe.

        Raises:
            ConfigError: There is no such path, or the values do not make a valid trial.
        """
        tree = self.trial.model_dump(mode="json")
        for path, value in params.items():
            _set(tree, path, value)
        try:
            return TrialSpec.model_validate(tree)
        except ValidationError as error:
            location, message = complaint(error, Document(tree), TrialSpec)
            raise ConfigError(f"{'.'.join(map(str, location))}: {message}") from error

    @model_validator(mode="after")
    def _search_makes_valid_trials(self) -> Self:
        for path, parameter in self.search.items():
            try:
                default = self._default(path)
            except ConfigError as error:
                _reject(("search", path), path, str(error))
            for value in parameter.corners():
                self._check_corner({path: value})
            if not parameter.contains(default):
                message = (
                    f"got {shown(default)} in the trial, which the search cannot reach; expected a value of the "
                    "parameter, because the first trial is the study's own defaults"
                )
                _reject(("search", path), default, message)
        corners = [[(path, value) for value in parameter.corners()] for path, parameter in self.search.items()]
        if math.prod(map(len, corners)) <= _MAX_CORNERS:
            for corner in itertools.product(*corners):
                self._check_corner(dict(corner))
        return self

    @model_validator(mode="after")
    def _training_fits(self) -> Self:
        if self.trial.adapter and self._searches_training:
            message = "got a search of how to train, and trial.adapter, which is trained already; remove one of the two"
            _reject(("search",), self.search, message)
        if self.trial.report and not self._searches_training:
            message = "got reports of a training that does not differ between trials; expected null: none can be pruned"
            _reject(("trial", "report"), self.trial.report.model_dump(), message)
        return self

    @model_validator(mode="after")
    def _sampler_can_search(self) -> Self:
        if not self.search:
            return self
        try:
            self.sampler.size(self.search)
        except ValueError as error:
            _reject(("sampler",), self.sampler.model_dump(), str(error))
        return self

    @model_validator(mode="after")
    def _warm_start_is_searched(self) -> Self:
        warm = self.warm_start
        if warm is None:
            return self
        if self.sampler.begins_itself:
            message = "got a sampler that says itself where to begin; expected tpe, random, qmc or grid"
            _reject(("warm_start",), warm.model_dump(mode="json"), message)
        if warm.best is not None and len(self.objective.names) > 1:
            message = f"got {warm.best} with an objective of several values; expected null, because they have a front"
            _reject(("warm_start", "best"), warm.best, message)
        for location, value, message in warm.problems(self.search):
            _reject(("warm_start", *location), value, message)
        for params in warm.params:
            self._check_corner(dict(params))
        return self

    @model_validator(mode="after")
    def _objective_is_measured(self) -> Self:
        known = self.trial.evaluate.metrics
        for name in self.objective.scores_needed():
            if name not in known:
                message = f"got score {name!r}; expected one of trial.evaluate.metrics; {did_you_mean(name, known)}"
                _reject(("objective",), name, message)
        return self

    @model_validator(mode="after")
    def _one_value_has_a_winner(self) -> Self:
        objective = self.objective
        if self.sampler.needs_one_value and len(objective.names) > 1:
            message = "got an objective of several values; expected one, along which this sampler can search"
            _reject(("objective",), objective.model_dump(), message)
        if self.limits.target is not None and len(objective.names) > 1:
            message = "got a target with an objective of several values; expected none; patience ends such a study"
            _reject(("limits", "target"), self.limits.target, message)
        if self.confirm_seeds and len(objective.names) > 1:
            message = (
                f"got {self.confirm_seeds} with an objective of several values; expected 0, because they have a front "
                "and no winner to compare"
            )
            _reject(("confirm_seeds",), self.confirm_seeds, message)
        return self

    @model_validator(mode="after")
    def _pruner_has_reports(self) -> Self:
        report = self.trial.report
        if self.pruner.needs_reports and report is None:
            message = f"got {self.pruner.model_dump()['kind']} without trial.report; expected when and on what to judge"
            _reject(("pruner",), self.pruner.model_dump(), message)
        metrics = self.trial.evaluate.metrics
        if report is not None and (late := [n for n in self.objective.scores_needed() if metrics[n].of_class]):
            message = f"got score {late[0]!r}, which reports do not have; expected an objective without, or no report"
            _reject(("trial", "report"), None, message)
        if report is not None and report.every >= (longest := self._longest()):
            message = f"got {report.every} for trials of at most {longest} steps; expected less, or no report"
            _reject(("trial", "report", "every"), report.every, message)
        return self

    def _longest(self) -> int:
        """Optimizer steps of the longest trial."""
        steps = self.search.get("train.steps")
        return max(int(cast("float", step)) for step in steps.corners()) if steps else self.trial.train.steps

    def _default(self, path: str) -> object:
        return get_value(self.trial.model_dump(mode="json"), path)

    def _check_corner(self, corner: dict[str, Value]) -> None:
        try:
            self.resolve(corner)
        except ConfigError as error:
            path = next(iter(corner))
            values = ", ".join(f"{name}={shown(value)}" for name, value in corner.items())
            got = shown(corner[path]) if len(corner) == 1 else values
            _reject(("search", path), corner[path], f"got {got}, which makes an invalid trial: {error}")


def load_study(path: Path, sets: Iterable[str] = ()) -> tuple[StudySpec, Document]:
    """Read and validate a study file.

    Raises:
        ConfigError: What is wrong with it, in one line.
    """
    document = load(path, sets)
    if several := [key for key in ("foreach", "stages", "from_study") if key in document.tree]:
        raise ConfigError(
            f"{document.where((several[0],))}: {several[0]}: got a file of several studies; expected one; name a "
            "trial's directory, or study.yaml in the folder of one of them"
        )
    try:
        return StudySpec.model_validate(document.tree), document
    except ValidationError as error:
        raise config_error(error, document, StudySpec) from error


def _reject(location: Location, value: object, message: str) -> Never:
    problem = PydanticCustomError("value_error", "{message}", {"message": message})
    raise ValidationError.from_exception_data(
        "StudySpec", [InitErrorDetails(type=problem, loc=location, input=value)]
    ) from None


def _owner(tree: Tree, path: str) -> tuple[Tree, str]:
    """The mapping that holds the last key of `path`, and that key."""
    *parents, leaf = path.split(".")
    owner: Any = tree
    for index, part in enumerate(parents):
        owner = cast("Tree", owner)[part] if isinstance(owner, dict) and part in owner else {}
        if owner is None:
            above = ".".join(parents[: index + 1])
            raise ConfigError(f"got a path below {above}, which is null in the trial; expected a mapping there")
    if not isinstance(owner, dict) or leaf not in owner:
        hint = did_you_mean(path, _paths(tree))
        raise ConfigError(f"got an unknown path; expected one into the trial; {hint}")
    return cast("Tree", owner), leaf


def get_value(tree: Tree, path: str) -> Any:
    """What stands at a dotted path of a trial. Raises ConfigError."""
    owner, leaf = _owner(tree, path)
    return owner[leaf]


def _set(tree: Tree, path: str, value: Value) -> None:
    owner, leaf = _owner(tree, path)
    owner[leaf] = value


def _paths(tree: Tree, above: str = "") -> Iterable[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _paths(cast("Tree", value), f"{above}{key}.")
        else:
            yield f"{above}{key}"
