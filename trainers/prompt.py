"""What a picture is asked to show, and the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from trainers.config import Config, LocalPath
from trainers.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; the last two are outside."""


def _has_an_area(box: Box) -> Box:
    left, top, right, bottom = box
    if left >= right or top >= bottom:
        raise ValueError(
            f"got the box {list(box)}; expected [left, top, right, bottom] with left < right and top < bottom"
        )
    return box


_FaceBox = Annotated[Box, AfterValidator(_has_an_area)]


class Prompt(Config):
    """Words, and whatever else a method shows its model; a study writes a plain prompt as a string."""

    text: Annotated[str, Field(min_length=1)]
    image: LocalPath | None = None
    """A picture to look like, or a photo of whom to show."""
    more_images: Annotated[tuple[LocalPath, ...], Field(min_length=1)] | None = None
    """Further photos of the person in `image`."""
    label: tuple[float, ...] | None = None
    """Label vector."""
    embedding: LocalPath | None = None
    """A file with a precomputed embedding of `image`."""
    box: _FaceBox | None = None
    """Where the face is to be in the picture that is drawn."""
    image_box: _FaceBox | None = None
    """Where the face is in `image`."""
    shows: Annotated[str, Field(min_length=1)] | None = None
    """What the picture should show, if the words do not say it. Scorers are told, models never are."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return {"text": data} if isinstance(data, str) else data

    @model_serializer(mode="wrap")
    def _to_text(self, handler: SerializerFunctionWrapHandler) -> Any:
        return self.text if self.is_plain and self.shows is None else handler(self)

    @property
    def is_plain(self) -> bool:
        """Whether a model is told words alone."""
        return self == Prompt.model_construct(text=self.text, shows=self.shows)

    def check_plain(self) -> None:
        """Raise ConfigError unless a model is told words alone."""
        if not self.is_plain:
            raise ConfigError(f"the prompt {str(self)!r} says more than words; expected text alone (this method)")

    def __str__(self) -> str:
        """The words, and in brackets what tells this prompt from others with the same words, on every machine alike."""
        details = [
            self.image and " and ".join(map(_name, (self.image, *(self.more_images or ())))),
            " ".join(f"{value:.9g}" for value in self.label or ()),
            self.embedding and _name(self.embedding),
            self.box and _numbers(self.box),
            self.image_box and f"face {_numbers(self.image_box)}",
        ]
        named = ", ".join(detail for detail in details if detail)
        return f"{self.text} ({named})" if named else self.text


def _name(path: Path) -> str:
    # Photos of people lie in a folder each, and are often called the same.
    return "/".join(path.parts[-2:])


def _numbers(box: Box) -> str:
    return ",".join(map(str, box))


MAX_SEED = 2**63
"""What numpy's seed sequences and a file's columns hold."""
Seed = Annotated[int, Field(ge=0, lt=MAX_SEED)]


@dataclass(frozen=True)
class Request:
    """A picture that is wanted."""

    prompt: Prompt
    seed: int


@dataclass(frozen=True)
class Sample:
    """A picture, and what it was asked to show."""

    prompt: Prompt
    seed: int
    image: Image.Image
    """8-bit RGB."""
