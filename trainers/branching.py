"""What branched attention does, and at which noise levels: `trainers.adapters.branched` has the mathematics."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from trainers.config import Config

Fraction = Annotated[float, Field(ge=0, le=1)]


class BranchConfig(Config):
    """What the branches do."""

    branched_self: bool = True
    """Whether self-attention is branched. Without it references are not looked at, and what remains is PhotoMaker."""
    branched_cross: bool = True
    """Whether references are told the face's own prompt (`face_embed_strategy`); otherwise the picture's."""
    face_embed_strategy: Literal["face", "id", "id_embeds"] = "face"
    """What a reference is told: `face` is `face_prompt`; `id` the picture's prompt with all but the identity's tokens
    masked; `id_embeds` the identity's tokens as they were before they were fused with the class word."""
    face_prompt: Annotated[str, Field(min_length=1)] = "a close-up human face"
    pose_adapt_ratio: Fraction = 0.0
    """How much of the face's keys and values is the picture's own; 1 leaves nothing of the reference."""
    ca_mixing_for_face: bool = False
    """Whether the face also attends to itself, beside the reference."""
    id_alpha: Fraction = 0.3
    """How much of the face's keys and values is a projection of the identity; 0 is none, and no projection."""
    branch_adapters: bool = False
    """Whether each layer has two more trained maps, of the face's tokens and of the reference's output."""
    gate: Fraction = 0.0
    """Where the trained gates of each layer begin: 0 is PhotoMaker as loaded, 1 puts the face's attention in place of
    the stock one at once."""
    train_branch_mode: Literal["both", "ref_only"] = "both"
    """`ref_only` lets self-attention learn from what references contribute alone: what the picture's own rows gather,
    their queries and their tokens among the face's keys are taken as they are."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if not self.branched_self and self.branched_cross:
            raise ValueError("branched_cross needs branched_self: nothing else looks at references; set it to false")
        if self.train_branch_mode == "ref_only" and not self.branched_self:
            raise ValueError("train_branch_mode ref_only needs branched_self; set it to both")
        return self


Mode = Literal["text", "photomaker", "branched"]


class Phase(Config):
    """How pictures are drawn from a noise level on."""

    start: Annotated[float, Field(ge=0, lt=1)]
    """Share of the training timesteps that lie behind: 0 is pure noise. It does not depend on how many steps a sampler
    takes."""
    mode: Mode
    """`text` is the prompt without the trigger word and without the identity, `photomaker` the prompt with it,
    `branched` also the reference."""


def _in_order(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    starts = [phase.start for phase in phases]
    if starts[0] != 0 or starts != sorted(set(starts)):
        raise ValueError(f"phases start at {starts}; expected 0 first, then ever larger ones")
    return phases


Phases = Annotated[tuple[Phase, ...], Field(min_length=1), AfterValidator(_in_order)]

# Steps 10 and 15 of 50, as the original draws.
DEFAULT_PHASES = (
    Phase(start=0.0, mode="text"),
    Phase(start=0.2, mode="photomaker"),
    Phase(start=0.3, mode="branched"),
)


def mode_at(phases: tuple[Phase, ...], t: float, num_timesteps: int) -> Mode:
    """How a picture at training timestep `t` is drawn."""
    behind = 1 - (t + 1) / num_timesteps
    modes: list[Mode] = [phase.mode for phase in phases if phase.start <= behind + 1e-9]
    return modes[-1]
