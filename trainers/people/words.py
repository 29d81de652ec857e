"""Prompts that name somebody: embeddings of a prompt in which a class word stands before the trigger word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from trainers.adapters.trigger import add_trigger, tokenize
from trainers.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float
    from torch import Tensor

    from trainers.backbones.sdxl import Sdxl


@dataclass(frozen=True)
class Words:
    """Prompts with a trigger word, one a row."""

    hidden: Float[Tensor, "b length width"]
    """The class word stands once for each identity token."""
    pooled: Float[Tensor, "b pooled"]
    mask: Bool[Tensor, "b length"]
    """Where it stands."""
    plain_hidden: Float[Tensor, "b length width"]
    """The prompt without the trigger word, the class word standing once."""
    plain_pooled: Float[Tensor, "b pooled"]

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        return dict(self.__dict__)

    def select(self, rows: Sequence[int]) -> Words:
        """The given rows."""
        return Words(**{name: value[list(rows)] for name, value in self.tensors().items()})

    def to(self, device: torch.device) -> Words:
        """The same on `device`."""
        return Words(**{name: value.to(device) for name, value in self.tensors().items()})

    @staticmethod
    def cat(parts: Sequence[Words]) -> Words:
        """All rows, in order."""
        columns = [part.tensors() for part in parts]
        return Words(**{name: torch.cat([column[name] for column in columns]) for name in columns[0]})


class Reader:
    """A backbone's text encoders, taught the trigger word."""

    def __init__(self, backbone: Sdxl, trigger: str, count: int) -> None:
        from transformers import CLIPTokenizer

        self._encoders, self._trigger, self._count = backbone.text_encoders, trigger, count
        self._device, config = backbone.device, backbone.config
        self._text_device = torch.device(config.text_encoder_device or backbone.device)
        self._tokenizers = [
            add_trigger(config.load_tokenizer(CLIPTokenizer, name), trigger) for name in config.tokenizer_names
        ]

    def read(self, prompt: str, photos: int = 1) -> Words:
        """One prompt's embeddings, without gradients, for an identity that so many photos tell.

        Raises:
            DataError: It has not exactly one trigger word right after a class word.
        """
        hidden, pooled, mask = self._embed(prompt, self._count * photos)
        plain_hidden, plain_pooled, _ = self._embed(prompt, 1)
        return Words(hidden, pooled, mask, plain_hidden, plain_pooled)

    @torch.no_grad()
    def _embed(self, prompt: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
        outputs: list[Any] = []
        masks: list[tuple[bool, ...]] = []
        for tokenizer, encoder in zip(self._tokenizers, self._encoders, strict=True):
            row = tokenize(tokenizer, prompt, self._trigger, count)
            network = cast("Any", encoder.to(self._text_device))
            with torch.autocast(network.device.type, enabled=False):
                outputs.append(network(torch.tensor([row.ids], device=network.device), output_hidden_states=True))
            masks.append(row.mask)
        if len(set(masks)) != 1:
            raise DataError(f"{prompt!r}: the two tokenizers cut it into different words")
        # SDXL was trained on penultimate states, before the final norm.
        hidden = torch.cat([output.hidden_states[-2].to(self._device) for output in outputs], -1)
        return hidden, outputs[-1].text_embeds.to(self._device), torch.tensor(masks[:1], device=self._device)
