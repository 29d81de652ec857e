"""From vectors (label vectors, embeddings of pictures) to tokens of the text's width."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trainers.errors import DataError
from trainers.streams import TokensConfig


class TokenConditioner(nn.Module):
    """Rows of numbers to rows of tokens; without bias, zeros become zero tokens."""

    def __init__(self, config: TokensConfig, width: int, rng: torch.Generator) -> None:
        """Weights are drawn from `rng`.

        Args:
            config: Sizes.
            width: Of the text's embeddings.
            rng: On the CPU, so that they are the same on every device.
        """
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        for before, after in pairwise(config.widths(width)):
            layers += [_linear(before, after, rng, bias=config.bias), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])
        self.norm = nn.LayerNorm(width, bias=config.bias) if config.layer_norm else nn.Identity()

    def forward(self, x: Float[Tensor, "b f"], present: Bool[Tensor, " b"]) -> Float[Tensor, "b tokens width"]:
        """Tokens of every row, zero where it is not `present`."""
        tokens = self.norm(self.proj(x).view(len(x), self.config.num_tokens, -1))
        # A product rather than a choice: all weights take part in every step, also when no row is present.
        return tokens * present[:, None, None].to(tokens.dtype)

    def zero_tokens(self) -> None:
        """Make all tokens zero, whatever the input."""
        last = self.norm if isinstance(self.norm, nn.LayerNorm) else self.proj[-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)


def _linear(before: int, after: int, rng: torch.Generator, *, bias: bool) -> nn.Linear:
    linear = nn.Linear(before, after, bias=bias)
    linear.weight.data.copy_(torch.randn(after, before, generator=rng) / before**0.5)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def read_embedding(path: Path, where: str, length: int) -> Float[Tensor, " f"]:
    """The vector in a `.npy` file, or the only tensor in a `.safetensors` file; dimensions of length 1 do not count.

    Raises:
        DataError: It cannot be read, is not one vector of `length` finite numbers; begins with `where`.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        if path.suffix == ".npy":
            value = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            tensors = safetensors.torch.load_file(path)
            if len(tensors) != 1:
                raise DataError(f"{where}: {path} has {len(tensors)} tensors; expected one embedding")
            value = next(iter(tensors.values()))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise DataError(f"{where}: {path} cannot be read ({error}); expected one vector of numbers") from error
    value = value.squeeze()
    if value.ndim != 1 or value.is_complex():
        found = f"shape {tuple(value.shape)} of {value.dtype}"
        raise DataError(f"{where}: {path} has {found}; expected one vector of {length} real numbers")
    if len(value) != length:
        raise DataError(f"{where}: {path} has {len(value)} numbers; expected {length} (in_features)")
    if not bool(value.isfinite().all()):
        raise DataError(f"{where}: {path} has infinite or undefined numbers; make it again")
    return value.float()


def stack(vectors: Sequence[Sequence[float] | Tensor | None], length: int) -> tuple[Tensor, Tensor]:
    """Rows for a conditioner: float32 vectors, zeros where there is none, and which rows have one."""
    rows = [torch.zeros(length) if vector is None else torch.as_tensor(vector).float() for vector in vectors]
    return torch.stack(rows), torch.tensor([vector is not None for vector in vectors])
