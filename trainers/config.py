"""Typed, immutable configuration and the `kind:` mechanism that every plug-in point uses."""

import importlib
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, ModelWrapValidatorHandler, model_validator


class Config(BaseModel):
    """A frozen mapping with typed keys: unknown keys are rejected and defaults are validated."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        polymorphic_serialization=True,
        use_attribute_docstrings=True,
        defer_build=True,
    )


class Choice(Config):
    """A config whose concrete class is named by its `kind` field.

    A direct subclass (`Launcher`) is a *family*. Each of its subclasses registers itself by declaring
    `kind: Literal["slurm"] = "slurm"`; a field typed with the family then accepts any of them. Adding a kind is
    therefore adding a class, in one file, and touching nothing else. A subclass without `kind` is what some kinds have
    in common.
    """

    _kinds: ClassVar[dict[str, type["Choice"]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if Choice in cls.__bases__:
            cls._kinds = {}
            return
        if "kind" not in cls.model_fields:
            return
        kind = cls.model_fields["kind"].default
        if kind in cls._kinds:
            raise TypeError(f"kind {kind!r} is both {cls._kinds[kind].__name__} and {cls.__name__}")
        cls._kinds[kind] = cls

    @classmethod
    def kinds(cls) -> list[str]:
        """Names that this family accepts, sorted."""
        return sorted(cls._kinds)

    @model_validator(mode="wrap")
    @classmethod
    def _dispatch(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if Choice not in cls.__bases__ or not isinstance(data, dict):
            return handler(data)
        kind = cast("dict[str, object]", data).get("kind")
        if not isinstance(kind, str) or kind not in cls._kinds:
            raise ValueError(f"unknown kind {kind!r}; expected one of {', '.join(cls.kinds())}")
        return cast("Self", cls._kinds[kind].model_validate(data))


def _is_anchored(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(
            f"got {str(path)!r}; expected a path that begins with /, ~/, ./ or ../ "
            "(the last two are relative to the file that says it)"
        )
    return path


LocalPath = Annotated[Path, AfterValidator(_is_anchored)]
"""An absolute path; study files may write `./`, `../` and `~/`, which are resolved when the file is read."""


def import_submodules(package: str, path: Iterable[str]) -> None:
    """Import every module of `package`, so that the kinds it declares are registered."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
