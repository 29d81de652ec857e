"""What a prompt that shows somebody must say."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trainers.data.identity import find_trigger
from trainers.data.transforms import find_size
from trainers.errors import ConfigError, DataError

if TYPE_CHECKING:
    from trainers.prompt import Prompt


def shows_nobody(prompt: Prompt, trigger: str) -> bool:
    """Whether a prompt is words alone, and the trigger word none of them."""
    return prompt.is_plain and trigger not in re.findall(r"\w+", prompt.text)


def check_said(prompt: Prompt, trigger: str, size: tuple[int, int]) -> None:
    """Find out whether a prompt says whom to show and where, in a picture of this height and width.

    Raises:
        ConfigError: It does not, or says more.
    """
    if prompt.label is not None or prompt.image is None:
        raise ConfigError(
            f"the prompt {str(prompt)!r}: expected words alone, or words with {trigger!r} and the photo of a person "
            "(image)"
        )
    if prompt.box is None:
        raise ConfigError(f"the prompt {str(prompt)!r} does not say where the face is to be; set box")
    (left, top, right, bottom), (height, width) = prompt.box, size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ConfigError(f"the prompt {str(prompt)!r}: box {prompt.box} is not inside {width} x {height} pixels")


def check_prompt(prompt: Prompt, trigger: str, size: tuple[int, int], *, finds: bool) -> None:
    """All that can be known of a prompt before a model is loaded; arguments as of `check_said`.

    Args:
        prompt: What a picture is to show.
        trigger: The trigger word.
        size: Height and width of the picture.
        finds: Whether faces can be looked for in photos.

    Raises:
        ConfigError: As `check_said`, or the trigger word is not where it belongs, or a face would have to be found.
        DataError: A file that it names is missing or broken, or the face's box is not inside the photo.
    """
    if shows_nobody(prompt, trigger):
        return
    check_said(prompt, trigger, size)
    where = f"the prompt {str(prompt)!r}"
    if complaint := find_trigger(prompt.text, trigger):
        raise ConfigError(f"{where}: {complaint}")
    known = prompt.embedding and prompt.image_box and not prompt.more_images
    if not (finds or known):
        raise ConfigError(f"{where}: a face would have to be looked for; set embedding and image_box, or train.faces")
    sizes = [find_size(photo, where) for photo in (prompt.image, *(prompt.more_images or ())) if photo]
    if prompt.embedding and not prompt.embedding.is_file():
        raise DataError(f"{where}: {prompt.embedding}: no such file; expected a face embedding")
    left, top, right, bottom = prompt.image_box or (0, 0, 1, 1)
    if left < 0 or top < 0 or right > sizes[0][1] or bottom > sizes[0][0]:
        raise DataError(
            f"{where}: image_box {prompt.image_box} is not inside {prompt.image}, {sizes[0][1]} x {sizes[0][0]} pixels"
        )
