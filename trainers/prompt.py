"""What a picture is asked to show, and the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from trainers.config import Config, LocalPath

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; the last two are outside."""


class Prompt(Config):
    """Words, and whatever else a method shows its model; a study writes a plain prompt as a string."""

    text: Annotated[str, Field(min_length=1)]
    image: LocalPath | None = None
    """A picture to look like, or a photo of whom to show."""
    label: tuple[float, ...] | None = None
    """Label vector."""
    embedding: LocalPath | None = None
    """A file with a precomputed embedding of `image`."""
    box: Box | None = None
    """Where the face is to be in the picture that is drawn."""
    image_box: Box | None = None
    """Where the face is in `image`."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return {"text": data} if isinstance(data, str) else data

    @model_serializer(mode="wrap")
    def _to_text(self, handler: SerializerFunctionWrapHandler) -> Any:
        return self.text if self.is_plain else handler(self)

    @property
    def is_plain(self) -> bool:
        """Whether it is words alone."""
        return self == Prompt.model_construct(text=self.text)

    def __str__(self) -> str:
        """The words, and in brackets what tells this prompt from others with the same words."""
        label = "" if self.label is None else " ".join(f"{value:g}" for value in self.label)
        details = [self.image.name if self.image else "", label, self.embedding.name if self.embedding else ""]
        details += [",".join(map(str, self.box)) if self.box else ""]
        named = ", ".join(detail for detail in details if detail)
        return f"{self.text} ({named})" if named else self.text


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
