"""A backbone that can be shown people: PhotoMaker's words, and references that are denoised beside the picture."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from typing_extensions import override

from trainers.adapters.branched import Branches, Faces, box_mask
from trainers.adapters.photomaker import IdEncoder, face_pixels, identity_features
from trainers.backbone import Condition, Moments, TextEmbeddings
from trainers.batch import Geometry
from trainers.branching import mode_at
from trainers.data.transforms import open_picture
from trainers.errors import DataError, ModelError
from trainers.framing import Framing
from trainers.people.face_vectors import find_face, read_embedding
from trainers.people.prompts import check_said, shows_nobody
from trainers.people.words import Reader, Words
from trainers.wrapped import Wrapped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Bool, Float, Int
    from PIL import Image
    from torch import Tensor

    from trainers.backbones.sdxl import Sdxl
    from trainers.branching import BranchConfig, Mode, Phase
    from trainers.face import FaceEmbedder
    from trainers.prompt import Box, Prompt


@dataclass(frozen=True)
class People:
    """Whom the rows of a call show, and where."""

    tokens: Float[Tensor, "b k width"]
    """Of the identity encoder, of all photos of a row's person, one after the other."""
    latents: Float[Tensor, "b c h w"]
    """Of the reference, the first of these photos, without noise."""
    noise: Float[Tensor, "b c h w"]
    """The reference's own."""
    mask: Float[Tensor, "b 1 h w"]
    """1 in the cells of the face in the picture."""
    reference_mask: Float[Tensor, "b 1 h w"]
    """The same in the reference."""

    @staticmethod
    def cat(parts: Sequence[People]) -> People:
        """All rows, in order."""
        return People(**{name: torch.cat([part.__dict__[name] for part in parts]) for name in parts[0].__dict__})


@dataclass(frozen=True)
class Options:
    """How people are shown."""

    branches: BranchConfig
    phases: tuple[Phase, ...]
    trigger: str


class PhotoMaker(Wrapped["Sdxl"]):
    """SDXL with an identity encoder, and branches in its self-attention."""

    def __init__(
        self,
        backbone: Sdxl,
        encoder: IdEncoder,
        branches: Branches,
        options: Options,
        faces: FaceEmbedder | None,
    ) -> None:
        """A model that nothing has been told yet.

        Raises:
            ModelError: The face embedder describes faces by other vectors than the encoder was trained on.
        """
        super().__init__(backbone)
        if faces is not None and faces.size != encoder.sizes.face:
            raise ModelError(
                f"train.faces makes embeddings of {faces.size} numbers, and train.photomaker expects "
                f"{encoder.sizes.face}; they are not made for one another"
            )
        self.encoder, self.branches, self.options = encoder, branches, options
        self.reader = Reader(backbone, options.trigger, encoder.sizes.tokens)
        self.faces = faces
        strategy, prompt = options.branches.face_embed_strategy, options.branches.face_prompt
        self._face_prompt = backbone.encode_prompts([prompt]) if strategy == "face" else None

    @override
    @torch.no_grad()
    def prepare(
        self, prompts: Sequence[Prompt | None], height: int, width: int, *, negative: str | None = None
    ) -> Condition:
        people: dict[tuple[Any, ...], tuple[Tensor, Tensor, Box]] = {}
        rows: list[Condition] = []
        for prompt in prompts:
            if prompt is None or shows_nobody(prompt, self.options.trigger):
                plain = self.backbone.prepare([prompt], height, width, negative=negative)
                rows.append(self.tell_nobody(plain, self.latent_shape(height, width)))
                continue
            check_said(prompt, self.options.trigger, (height, width))
            key = (prompt.image, prompt.more_images, prompt.image_box, prompt.embedding)
            if key not in people:
                people[key] = self._meet(prompt, (height, width))
            rows.append(self._tell_one(prompt, people[key], (height, width)))
        return Condition.cat(rows)

    def _meet(self, prompt: Prompt, size: tuple[int, int]) -> tuple[Tensor, Tensor, Box]:
        """Tokens of a prompt's photos, latents of the first, and the face's box in that, framed to `size`."""
        assert prompt.image is not None
        image = open_picture(prompt.image)
        vector = read_embedding(prompt.embedding, prompt.image) if prompt.embedding else None
        self.check_vector(vector, f"{prompt.embedding}: the embedding of {prompt.image.name}")
        vector, box = find_face(self.faces, image, prompt.image, vector, prompt.image_box)
        tokens = [self.identify(image, box, vector)]
        for path in prompt.more_images or ():
            other = open_picture(path)
            vector, place = find_face(self.faces, other, path, None, None)
            tokens.append(self.identify(other, place, vector))
        framing = Framing.around((image.height, image.width), size, box)
        pixels = torch.from_numpy(np.asarray(framing.apply(image), np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        return torch.cat(tokens, 1), self.clean_latents(self.backbone.encode_image(pixels)), framing.box(box)

    def _tell_one(self, prompt: Prompt, met: tuple[Tensor, Tensor, Box], size: tuple[int, int]) -> Condition:
        tokens, latents, reference_box = met
        assert prompt.box is not None
        words = np.frombuffer(hashlib.sha256(f"reference of {prompt}".encode()).digest(), np.uint32)
        state = np.random.SeedSequence(words.tolist()).generate_state(1, np.uint64)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(int(state[0]))).to(self.device)
        grid = cast("tuple[int, int]", tuple(latents.shape[-2:]))
        masks = [box_mask(box, size, grid)[None].to(self.device) for box in (prompt.box, reference_box)]
        told = self.reader.read(prompt.text, 1 + len(prompt.more_images or ()))
        return self.tell(told, People(tokens, latents, noise, *masks), [Geometry.whole(*size)])

    def check_vector(self, vector: Float[Tensor, " n"] | None, where: str) -> None:
        """Raise DataError if a face's vector is not of the length that the identity encoder was trained on."""
        expected = self.encoder.sizes.face
        if vector is not None and len(vector) != expected:
            raise DataError(f"{where} has {len(vector)} numbers; expected {expected} (train.photomaker's)")

    def identify(self, image: Image.Image, box: Box, vector: Float[Tensor, " n"]) -> Float[Tensor, "1 k width"]:
        """The tokens of one photo."""
        pixels = face_pixels(image, box, self.encoder.sizes.image)
        return self.encoder.tokens(pixels.to(self.device), vector[None].to(self.device))

    def clean_latents(self, moments: Moments) -> Float[Tensor, "b c h w"]:
        """The latents of reference photos: the most likely ones."""
        return self.backbone.sample_latents(moments, torch.zeros_like(moments.mean))

    def tell(self, words: Words, people: People, geometries: Sequence[Geometry]) -> Condition:
        """What the denoiser is told of rows that show somebody; with gradients, if the encoder is trained."""
        hidden = self.encoder.fuse(words.hidden, people.tokens, words.mask)
        face, mask = self._face_words(hidden, people.tokens, words.mask)
        told = self.backbone.condition(TextEmbeddings(hidden, words.pooled), geometries)
        extra = {
            "shows": torch.ones(len(hidden), dtype=torch.bool),
            "plain_hidden": words.plain_hidden,
            "plain_pooled": words.plain_pooled,
            "face_hidden": face,
            "face_tokens": mask,
            "identity": identity_features(people.tokens),
            "latents": people.latents,
            "noise": people.noise,
            "mask": people.mask,
            "reference_mask": people.reference_mask,
        }
        return Condition(told.text, told.sizes, extra)

    def tell_nobody(self, told: Condition, shape: tuple[int, int, int]) -> Condition:
        """The same of rows that show nobody: what they are told besides words is never looked at."""
        hidden, pooled = told.text.hidden, told.text.pooled
        count, length, width = hidden.shape
        latents, grid = hidden.new_zeros(count, *shape, dtype=torch.float32), (count, 1, *shape[1:])
        extra: dict[str, Any] = {
            "shows": torch.zeros(count, dtype=torch.bool),
            "plain_hidden": hidden,
            "plain_pooled": pooled,
            "face_hidden": hidden,
            "face_tokens": torch.ones(count, length, dtype=torch.bool, device=hidden.device),
            "identity": latents.new_zeros(count, width),
            "latents": latents,
            "noise": latents,
            "mask": latents.new_zeros(grid),
            "reference_mask": latents.new_zeros(grid),
        }
        return Condition(told.text, told.sizes, extra)

    def _face_words(
        self, hidden: Tensor, tokens: Tensor, mask: Tensor
    ) -> tuple[Float[Tensor, "b length width"], Bool[Tensor, "b length"]]:
        """What references are told, and which of its tokens count."""
        branches = self.options.branches
        everything = torch.ones_like(mask)
        if not branches.branched_cross:
            return hidden, everything
        if self._face_prompt is not None:
            return self._face_prompt.hidden.to(hidden).expand_as(hidden), everything
        if branches.face_embed_strategy == "id":
            return hidden, mask
        padded = torch.nn.functional.pad(tokens.to(hidden.dtype), (0, 0, 0, hidden.shape[1] - tokens.shape[1]))
        return padded, (torch.arange(hidden.shape[1], device=mask.device) < tokens.shape[1]).expand_as(mask)

    @override
    def denoise(
        self, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"] | Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b c h w"]:
        steps = self.backbone.process.num_timesteps
        return self.denoise_as(
            [mode_at(self.options.phases, time, steps) for time in cast("list[float]", t.tolist())], x_t, t, condition
        )

    def denoise_as(
        self, modes: Sequence[Mode], x_t: Float[Tensor, "b c h w"], t: Tensor, condition: Condition
    ) -> Float[Tensor, "b c h w"]:
        """As `denoise`, each row in the given mode; rows that show nobody are plain text in all of them."""
        shows = cast("list[bool]", condition.extra["shows"].tolist())
        silent = [i for i, mode in enumerate(modes) if mode == "text" and shows[i]]
        if silent:
            condition = _silence(condition, silent)
        branched = [i for i, mode in enumerate(modes) if mode == "branched" and shows[i]]
        if not (branched and self.options.branches.branched_self):
            return self.backbone.denoise(x_t, t, Condition(condition.text, condition.sizes))
        order = [i for i in range(len(x_t)) if i not in branched] + branched
        beside = condition.select(branched)
        noised = self.backbone.process.add_noise(
            beside.extra["latents"], beside.extra["noise"], t[branched].round().long()
        )
        out = self.backbone.denoise(
            torch.cat([x_t[order], noised.to(x_t.dtype)]),
            t[[*order, *branched]],
            self._double(condition, order, beside),
        )
        back = sorted(range(len(order)), key=order.__getitem__)
        return out[back]

    def _double(self, condition: Condition, order: list[int], beside: Condition) -> Condition:
        """The rows in `order`, then the references of the last ones."""
        branches = self.options.branches
        ahead = Condition(condition.text, condition.sizes).select(order)
        behind = Condition(TextEmbeddings(beside.extra["face_hidden"], beside.text.pooled), beside.sizes)
        masked = branches.branched_cross and branches.face_embed_strategy != "face"
        everything = torch.ones(ahead.text.hidden.shape[:2], dtype=torch.bool, device=self.device)
        faces = Faces(
            beside.extra["mask"],
            beside.extra["reference_mask"],
            beside.extra["identity"],
            torch.cat([everything, beside.extra["face_tokens"]]) if masked else None,
            self.scale,
        )
        both = Condition.cat([ahead, behind])
        # One object, not tensors of one row each: its rows are the last of the call.
        return Condition(both.text, both.sizes, cast("Mapping[str, Tensor]", {"faces": faces}))


def _silence(condition: Condition, rows: list[int]) -> Condition:
    """The same, with plain prompts in `rows`."""
    pooled = condition.text.pooled
    assert pooled is not None
    chosen = torch.zeros(len(pooled), dtype=torch.bool)
    chosen[rows] = True
    chosen = chosen.to(pooled.device)
    hidden = torch.where(chosen[:, None, None], condition.extra["plain_hidden"], condition.text.hidden)
    pooled = torch.where(chosen[:, None], condition.extra["plain_pooled"], pooled)
    return Condition(TextEmbeddings(hidden, pooled), condition.sizes, condition.extra)
