"""The trigger word: in "a man img in a suit", `img` marks "man" as the class word that carries the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainers.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class TokenRow:
    """A prompt's tokens after its class word was repeated."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    """Where the class word stands."""


def expand_trigger(ids: Sequence[int], trigger: int, count: int, *, length: int, pad: int) -> TokenRow:
    """Take the trigger word out and repeat the word before it, the class word, so that it stands `count` times.

    Args:
        ids: A prompt's tokens from its start token to its end token, without padding, of any length.
        trigger: The trigger word's token.
        count: Identity tokens of all photos together.
        length: Tokens that the text encoder takes. What is too much is cut from before the end token.
        pad: Token that fills the rest.

    Raises:
        ValueError: There is not exactly one trigger, no word before it, or it stands too far back; the message says
            which, and the caller knows the prompt.
    """
    places = [place for place, token in enumerate(ids) if token == trigger]
    if len(places) != 1:
        raise ValueError(f"{len(places)} trigger words; expected exactly one, right after the class word")
    place = places[0] - 1
    if place < 1:
        raise ValueError("no class word before the trigger word")
    if place + count > length - 1:
        raise ValueError(f"the class word stands too far back: {place + count} tokens, {length - 2} fit")
    words = [*ids[:place], *[ids[place]] * count, *ids[place + 2 : -1]]
    kept = [*words[: length - 1], ids[-1]]
    padded = [*kept, *[pad] * (length - len(kept))]
    return TokenRow(tuple(padded), tuple(place <= i < place + count for i in range(length)))


def tokenize(tokenizer: Any, prompt: str, trigger: str, count: int) -> TokenRow:
    """A prompt with a trigger word as the text encoder is to see it.

    Args:
        tokenizer: CLIP's, with `trigger` added as a token of its own.
        prompt: Says "a man img in a suit".
        trigger: Such as "img".
        count: Identity tokens of all photos together.

    Raises:
        DataError: As `expand_trigger`.
    """
    ids = tokenizer(prompt, truncation=False, padding=False).input_ids
    number = tokenizer.convert_tokens_to_ids(trigger)
    try:
        return expand_trigger(ids, number, count, length=tokenizer.model_max_length, pad=tokenizer.pad_token_id)
    except ValueError as error:
        raise DataError(f"{prompt!r}: {error} (the trigger word is {trigger!r})") from error


def add_trigger(tokenizer: Any, trigger: str) -> Any:
    """Teach a tokenizer, in place, that the trigger word is a token of its own."""
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(trigger, single_word=True, normalized=True)], special_tokens=True)
    return tokenizer
