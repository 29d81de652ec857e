"""PhotoMaker v2 with branched attention: LoRA and branches that learn to show the person of a reference photo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from typing_extensions import override

import trainers.faces  # noqa: F401  # pyright: ignore[reportUnusedImport]  registers the kinds
from trainers.adapters.lora import LoraConfig
from trainers.backbones.sdxl import SdxlConfig
from trainers.batch import Stream, init_seed
from trainers.branching import DEFAULT_PHASES, BranchConfig, Fraction, Phases
from trainers.config import LocalPath
from trainers.data.identity import IdentityConfig, IdentityExample, check_people, choose_photos, others
from trainers.errors import ConfigError, ModelError
from trainers.face import FaceConfig
from trainers.method import Method, Trained
from trainers.people.files import restore, save
from trainers.people.prompts import check_prompt
from trainers.tuning import TunedConfig, export, load, tune

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch
    from accelerate import Accelerator
    from jaxtyping import Float
    from torch import Tensor

    from trainers.backbone import Condition, Model
    from trainers.batch import Batch
    from trainers.frozen import Images
    from trainers.people.identities import Identities
    from trainers.people.model import People, PhotoMaker
    from trainers.prompt import Prompt
    from trainers.version import Lineage

_BRANCHES, _ENCODER = "branches.safetensors", "id_encoder.safetensors"


class PhotoMakerConfig(TunedConfig):
    """Denoising loss on photos of people, each with another photo of the same person as its reference.

    PhotoMaker's own LoRA is merged into the base for good; what is trained is added to that.
    """

    kind: Literal["photomaker"] = "photomaker"
    backbone: SdxlConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    data: IdentityConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    photomaker: LocalPath
    """PhotoMaker v2's checkpoint: `photomaker-v2.bin`, or safetensors with the same tensors."""
    faces: FaceConfig | None = None
    """What finds faces and says whose they are; null needs `data.embeddings`, and a box and an embedding in every
    prompt."""
    trigger_word: Annotated[str, Field(pattern=r"^\w+$")] = "img"
    """Stands right after the class word in captions and prompts, as in "a man img in a suit"."""
    lora: LoraConfig | None = LoraConfig(rank=16)
    references: PositiveInt = 1
    """Other photos of its person that a picture is learnt with: all give tokens, the first is what branches look at."""
    branches: BranchConfig = BranchConfig()
    branch_lr_scale: PositiveFloat = 10.0
    """The branches' learning rate is the optimizer's times this: their gates have a long way to go."""
    train_id_encoder: bool = False
    """Whether the identity encoder's perceiver and fusion are trained too; its vision tower never is."""
    id_encoder_lr_scale: PositiveFloat = 1.0
    """The identity encoder's learning rate is the optimizer's times this."""
    condition_dropout: Fraction = 0.1
    """Probability that an example is shown without prompt, identity and reference, so that guidance keeps working."""
    face_share: Fraction = 0.5
    """Share of an example's loss that is the mean over its face's box alone; the rest is the mean over all of it."""
    phases: Phases = DEFAULT_PHASES
    """How pictures are drawn at each noise level; training is branched at all of them."""
    draw_on: SdxlConfig | None = None
    """Another base to draw pictures on, with what was trained on `backbone`; null is `backbone`."""

    @property
    @override
    def without_weak(self) -> str | None:
        return "PhotoMaker"

    @model_validator(mode="after")
    def _only_adapters(self) -> Self:
        if self.lora is None or not self.text_is_frozen:
            raise ValueError(
                "photomaker trains adapters of the UNet alone; set lora, and leave text_encoder_lora and "
                "train_text_encoders out"
            )
        return self

    @override
    def check(self) -> None:
        super().check()
        for name, backbone in (("backbone", self.backbone), ("draw_on", self.draw_on)):
            if backbone is None:
                continue
            backbone.check()
            if backbone.stage != "base":
                raise ModelError(f"train.{name}: {backbone.path} is SDXL's refiner; expected the base")
        if not self.photomaker.is_file():
            raise ModelError(f"{self.photomaker}: no such file; expected photomaker-v2.bin (train.photomaker)")
        self.data.check_captions(self.trigger_word)
        self.data.check_references(self.references)
        if self.faces is not None:
            self.faces.check()
        elif self.data.embeddings is None:
            raise ConfigError("train.faces is missing; expected a face embedder, or data.embeddings")

    @override
    def check_prompts(self, prompts: Iterable[Prompt], resolution: int) -> None:
        for prompt in prompts:
            check_prompt(prompt, self.trigger_word, (resolution, resolution), finds=self.faces is not None)

    @override
    def num_trainable(self) -> int:
        """Exact for adapters and branches; of an identity encoder that is trained, all there is."""
        unet = self.backbone.weight_shapes()["unet"]
        total = super().num_trainable()
        if self.branches.branched_self:
            id_width = next(shape[1] for name, shape in unet.items() if name.endswith("attn2.to_k.weight"))
            for width in (shape[1] for name, shape in unet.items() if name.endswith("attn1.to_q.weight")):
                total += width + 2 * width**2 * self.branches.branch_adapters
                total += width * id_width * (self.branches.id_alpha > 0)
        if self.train_id_encoder:
            total += self.photomaker.stat().st_size // 2  # at least two bytes a number
        return total

    @override
    def build(self, seed: int, cache: Path | None, accelerator: Accelerator) -> Method:
        from trainers.cache import Cache
        from trainers.frozen import Frozen, encode_images
        from trainers.people.identities import identify

        model = self.load_photomaker(self.backbone, init_seed(seed, 9), accelerator)
        frozen = Frozen(self.backbone, model.backbone, Cache(cache) if cache else None, accelerator)
        images = encode_images(frozen, self.data, held_out=self.validation is not None)
        images, identities = identify(frozen, images, self, model)
        check_people(cast("Any", images.split.train), self.data.index_path, self.references + 1)
        return PhotoMakerMethod(self, seed, model, (images, identities), accelerator)

    @override
    def load_trained(self, folder: Path | None, accelerator: Accelerator) -> Model:
        model = self.load_photomaker(self.draw_on or self.backbone, 0, accelerator)
        model.branches.requires_grad_(requires_grad=False)
        if folder is None:
            model.branches.close()  # what training starts from is PhotoMaker as published, wherever gates begin
            return model
        load(model.backbone, folder)
        if self.branches.branched_self:
            restore(model.branches, folder / _BRANCHES)
        if self.train_id_encoder:
            restore(model.encoder, folder / _ENCODER)
        return model

    def load_photomaker(self, base: SdxlConfig, seed: int, accelerator: Accelerator) -> PhotoMaker:
        """PhotoMaker on a base, with branches that are not trained yet.

        Raises:
            ModelError: The checkpoint is of another size than the base.
        """
        from trainers.adapters.branched import install
        from trainers.adapters.photomaker import IdEncoder, fuse_lora, read_checkpoint
        from trainers.people.model import Options, PhotoMaker

        backbone = base.load(accelerator.device, self.frozen_dtype())
        checkpoint = read_checkpoint(self.photomaker)
        encoder = IdEncoder.load(checkpoint.id_encoder, self.photomaker).float().to(accelerator.device)
        width = cast("Any", backbone.denoiser).config.cross_attention_dim
        if encoder.sizes.width != width:
            raise ModelError(
                f"{self.photomaker}: its tokens have {encoder.sizes.width} numbers, prompts of {base.path} {width}; "
                "they are not made for one another"
            )
        fuse_lora(backbone.denoiser, checkpoint.lora_weights, backbone.pipeline)
        branches = install(backbone.denoiser, self.branches, encoder.sizes.width, seed)
        faces = self.faces.open(accelerator.device) if self.faces else None
        return PhotoMaker(backbone, encoder, branches, Options(self.branches, self.phases, self.trigger_word), faces)


class PhotoMakerMethod(Method):
    """PhotoMaker that learns to look at references."""

    def __init__(
        self,
        config: PhotoMakerConfig,
        seed: int,
        model: PhotoMaker,
        pictures: tuple[Images, Identities],
        accelerator: Accelerator,
    ) -> None:
        from trainers.adapters.branched import unreached
        from trainers.denoising import Denoising

        self._images, self._identities = pictures
        self.config, self.data, self.seed, self.backbone = config, config.data, seed, model.backbone
        self.batch_size = config.batch_size
        self.examples, self.held_out = self._images.split.train, self._images.split.held_out
        self.unreadable = self._images.split.unreadable
        self.photomaker, self._accelerator = model, accelerator
        everyone = cast("tuple[IdentityExample, ...]", (*self.examples, *self.held_out))
        self._people, self._boxes = everyone, [example.box for example in everyone]
        self._others = [others(everyone, i, len(self.examples)) for i in range(len(everyone))]
        self._denoising = Denoising(model.backbone, self._images, config.loss, seed)
        self._trained = tune(model.backbone, config, seed)
        for layer in unreached(model.backbone.denoiser, config.branches):
            model.backbone.denoiser.get_submodule(layer).requires_grad_(requires_grad=False)
        if config.branches.branched_self:
            self._trained["branches"] = Trained(model.branches, config.branch_lr_scale)
        if config.train_id_encoder:
            for part in (model.encoder.qformer_perceiver, model.encoder.fuse_module):
                part.requires_grad_(requires_grad=True)
            self._trained["id_encoder"] = Trained(model.encoder, config.id_encoder_lr_scale)

    @property
    @override
    def model(self) -> Model:
        if self.config.draw_on is None:
            return self.photomaker
        from pathlib import Path
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as folder:
            self.export(Path(folder))
            return self.config.load_trained(Path(folder), self._accelerator)

    @override
    def remember(self, lineage: Lineage) -> None:
        self.photomaker.lineage = lineage

    @override
    def trained(self) -> Mapping[str, Trained]:
        return self._trained

    @override
    def losses(self, batch: Batch) -> Float[Tensor, " b"]:
        noised = self._denoising.noised(batch)
        kept = self._denoising.kept(batch, self.config.condition_dropout)
        condition = self.condition(batch, kept)
        prediction = self.photomaker.denoise_as(("branched",) * len(kept), noised.x_t, noised.t, condition)
        errors = (prediction.float() - noised.target).square()
        return self._denoising.weigh(self._mean(errors, batch, kept), noised) + self._touch(kept)

    def condition(self, batch: Batch, kept: list[bool]) -> Condition:
        """What each row is told: its caption, the person of a reference, and that reference; or nothing at all."""
        from trainers.backbone import Condition

        model, device = self.photomaker, self.backbone.device
        rows = list(range(len(kept)))
        shown, dropped = ([row for row in rows if kept[row] is wanted] for wanted in (True, False))
        parts: list[Condition] = []
        if shown:
            indices = [batch.indices[row] for row in shown]
            words = self._identities.words.select([self._identities.captions[self.example(i).prompt] for i in indices])
            geometries = [self._images.geometries[i] for i in indices]
            parts.append(model.tell(words.to(device), self.people(batch, shown), geometries))
        if dropped:
            geometries = [self._images.geometries[batch.indices[row]] for row in dropped]
            text = self._identities.nothing.select([0] * len(dropped))
            told = self.backbone.condition(text.to(device), geometries)
            parts.append(model.tell_nobody(told, cast("Any", tuple(self._images.moments.mean.shape[1:]))))
        order = [*shown, *dropped]
        return Condition.cat(parts).select(sorted(rows, key=order.__getitem__))

    def people(self, batch: Batch, rows: list[int]) -> People:
        """References for the given rows of a batch: other photos of the same people, drawn anew at each step."""
        import torch

        from trainers.adapters.branched import box_mask
        from trainers.people.model import People

        model, device, shape = self.photomaker, self.backbone.device, self._images.moments.mean.shape[1:]
        rngs = self._denoising.rngs(batch, Stream.REFERENCE)
        indices = [batch.indices[row] for row in rows]
        drawn = [
            int(torch.randint(len(self._others[i]), (), generator=rngs[row]))
            for i, row in zip(indices, rows, strict=True)
        ]
        references = [self._others[i][place] for i, place in zip(indices, drawn, strict=True)]
        noise = torch.stack([torch.randn(shape, generator=rngs[row]) for row in rows])
        masks = [
            torch.stack([box_mask(self._boxes[i], self.data.size, (shape[1], shape[2])) for i in chosen])
            for chosen in (indices, references)
        ]
        which = zip(indices, references, rows, strict=True)
        photos = [photo for i, reference, row in which for photo in self._photos(i, reference, rngs[row])]
        return People(
            self._identities.tokens(photos, model).reshape(len(rows), -1, model.encoder.sizes.width),
            model.clean_latents(self._images.select(references, device)),
            noise.to(device, non_blocking=True),
            *(mask.to(device, non_blocking=True) for mask in masks),
        )

    def _photos(self, index: int, reference: int, rng: torch.Generator) -> list[int]:
        """The reference of the person at `index`, and as many further photos as are wanted."""
        import torch

        candidates = self._others[index]
        order = cast("list[int]", torch.randperm(len(candidates), generator=rng).tolist())
        return choose_photos(self._people, reference, (candidates[i] for i in order), self.config.references)

    def _mean(self, errors: Float[Tensor, "b c h w"], batch: Batch, kept: list[bool]) -> Float[Tensor, " b"]:
        """Each row's mean over all of it and, if it shows its person, over the face's box."""
        import torch

        from trainers.adapters.branched import box_mask

        grid = (errors.shape[2], errors.shape[3])
        inside = torch.stack([box_mask(self._boxes[i], self.data.size, grid) for i in batch.indices]).to(errors.device)
        face = (errors * inside).sum((1, 2, 3)) / (inside.sum((1, 2, 3)) * errors.shape[1])
        share = self.config.face_share * errors.new_tensor([float(one) for one in kept])
        return (1 - share) * errors.mean((1, 2, 3)) + share * face

    def _touch(self, kept: list[bool]) -> Tensor | float:
        """Zero; where no row shows anybody, with a gradient of zero for what then takes no part, as peers wait for."""
        idle = [self._trained[name] for name in ("branches", "id_encoder") if name in self._trained]
        if any(kept) or not idle:
            return 0.0
        parts = [parameter.sum() for trained in idle for parameter in trained.parameters().values()]
        return 0.0 * cast("Tensor", sum(parts))

    @override
    def export(self, folder: Path) -> None:
        export(self.backbone, {"unet": self._trained["unet"]}, folder)
        for name, file in (("branches", _BRANCHES), ("id_encoder", _ENCODER)):
            if name in self._trained:
                save(self._trained[name].parameters(), folder / file)
