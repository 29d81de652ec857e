"""DreamBooth that keeps the untrained model's queries where it should not forget how to compose a picture.

To the denoising losses of the subject and of its class (Ruiz et al., 2023, arXiv:2208.12242) it adds the mean squared
distance between one self-attention layer's queries and those of the untrained model. Each of the three has rows of its
own in a batch, and any of them may be left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator
from typing_extensions import override

from trainers.adapters.queries import call_with_queries, choose_layer
from trainers.batch import Batch, Stream, shuffled
from trainers.config import Config
from trainers.errors import ConfigError
from trainers.matching.losses import PdmConfig, QueryMatching, query_losses
from trainers.matching.masks import MaskSource, fit_masks
from trainers.method import Method, Trained
from trainers.prior import PriorConfig
from trainers.tuning import TunedConfig, export, tune

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from accelerate import Accelerator
    from jaxtyping import Float
    from torch import Tensor

    from trainers.denoising import Noised
    from trainers.frozen import Frozen, Images

Role = Literal["instance", "prior", "pdm"]


class InstanceConfig(Config):
    """The denoising loss of the subject's pictures."""

    masked: bool = False
    """Count errors on the subject alone, whatever surrounds it."""


class ClassConfig(PriorConfig):
    """The denoising loss of pictures of the subject's class."""

    masked: bool = False
    """Count errors on the object alone. Nobody has masks of pictures that are yet to be drawn, so a source is needed
    that finds them."""


class PdmboothConfig(TunedConfig):
    """Up to three losses: of the subject, of its class, and of the queries; adapters or every weight."""

    kind: Literal["pdmbooth"] = "pdmbooth"
    instance: InstanceConfig | None = InstanceConfig()
    """Null leaves the subject's denoising loss out."""
    prior: ClassConfig | None = None
    """Null leaves the class's denoising loss out."""
    pdm: PdmConfig | None = PdmConfig()
    """Null leaves the query-matching loss out."""
    masks: MaskSource | None = None
    """Where the subject is in its pictures, for the losses that are `masked`."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """The losses in use, in the order in which rows of a batch take turns."""
        sections: dict[Role, object] = {"instance": self.instance, "prior": self.prior, "pdm": self.pdm}
        return tuple(role for role, section in sections.items() if section is not None)

    @property
    def masked(self) -> tuple[Role, ...]:
        """The losses that count inside masks alone."""
        sections = {"instance": self.instance, "prior": self.prior, "pdm": self.pdm}
        return tuple(role for role in self.roles if (section := sections[role]) and section.masked)

    @model_validator(mode="after")
    def _something_is_learned(self) -> Self:
        if not self.roles:
            raise ValueError("instance, prior and pdm are all null; expected at least one loss")
        if self.pdm and self.roles == ("pdm",) and self.pdm.prompt is None and self.pdm.target.same:
            raise ValueError(
                "pdm alone, with target same_latent and prompt null, compares the model with itself and teaches "
                "nothing; add instance or prior, or set pdm.prompt or another pdm.target"
            )
        return self

    @model_validator(mode="after")
    def _pictures_are_alike(self) -> Self:
        if len(self.data.sizes) > 1:
            raise ValueError("pdmbooth compares pictures of one shape; remove data.buckets")
        return self

    @model_validator(mode="after")
    def _queries_can_be_read(self) -> Self:
        if self.pdm and self.compile_blocks:
            raise ValueError("compile_blocks hides the queries that pdm compares; expected compile_blocks: false")
        return self

    @model_validator(mode="after")
    def _masks_are_given_and_used(self) -> Self:
        if self.masked and self.masks is None:
            raise ValueError(f"{self.masked[0]}.masked is true and masks is null; set masks, or masked: false")
        if self.masks and not self.masked:
            raise ValueError(
                "masks are given and no loss is masked; set instance.masked or pdm.masked, or remove masks"
            )
        if self.masks and "prior" in self.masked and not self.masks.finds:
            raise ValueError(
                "prior.masked is true and class pictures come without masks; expected a source that finds them, such "
                "as masks: {kind: sam, …}, or prior.masked: false"
            )
        return self

    @override
    def check(self) -> None:
        super().check()
        shapes = self.backbone.weight_shapes()
        if "unet" not in shapes:
            raise ConfigError(
                f"train.backbone: a model of {', '.join(shapes)} has no UNet to match queries in; expected sd or sdxl"
            )
        if self.prior:
            self.prior.check(self.data, self.backbone)
        if self.pdm:
            choose_layer(self.pdm.layer, shapes["unet"])
            self.pdm.check(self.backbone.num_timesteps)
        if self.masks:
            self.masks.check([example.path for example in self.data.split().train])

    @override
    def build(self, seed: int, cache: Path | None, accelerator: Accelerator) -> Method:
        from trainers.cache import Cache
        from trainers.frozen import Frozen, encode_images

        if "prior" in self.masked and cache is None:
            raise ConfigError(
                "train.prior.masked: without a cache drawn pictures are not kept long enough to mask them"
            )
        backbone = self.backbone.load(accelerator.device, self.frozen_dtype())
        frozen = Frozen(self.backbone, backbone, Cache(cache) if cache else None, accelerator)
        subject = encode_images(frozen, self.data, held_out=self.validation is not None)
        parts: dict[Role, Images] = {"instance": subject, "pdm": subject}
        if self.prior:
            parts["prior"] = self.prior.encode(frozen, self.data.size[0])
        return Pdmbooth(self, seed, frozen, {role: parts[role] for role in self.roles}, subject)


class Pdmbooth(Method):
    """A pretrained model that learns a subject beside the model it was."""

    def __init__(
        self, config: PdmboothConfig, seed: int, frozen: Frozen, parts: Mapping[Role, Images], subject: Images
    ) -> None:
        from trainers.denoising import Denoising
        from trainers.frozen import encode_texts

        self.config, self.data, self.seed, self.backbone = config, config.data, seed, frozen.backbone
        self.batch_size = config.batch_size
        self._images, self._rows = _in_rows(parts, subject)
        split = self._images.split
        self.examples, self.held_out, self.unreadable = split.train, split.held_out, split.unreadable
        self._denoising = Denoising(frozen.backbone, self._images, config.loss, seed)
        self._masks = _find_masks(config, frozen, parts, len(self._images.geometries))
        captions = [example.prompt for example in (*self.examples, *self.held_out)]
        self._texts = encode_texts(frozen, captions) if config.text_is_frozen else None
        self._matching = None
        if config.pdm:
            self._matching = QueryMatching(config.pdm, frozen, subject, adapters=config.lora is not None)
        self._trained = tune(self.backbone, config, seed)
        if config.roles == ("pdm",):
            with frozen.accelerator.autocast():
                self._freeze_what_acts_after_the_queries()

    @override
    def trained(self) -> Mapping[str, Trained]:
        return self._trained

    @override
    def pick(self, step: int, position: int) -> int:
        """Roles take turns, so that in the long run each has its share whatever the size of a batch."""
        turn, place = divmod(position, len(self._rows))
        role = self.config.roles[place]
        rows = self._rows[role]
        if role == "prior":
            return rows.start + shuffled(self.seed, len(rows), turn)
        return rows.start + self.data.pick(
            self.examples[rows.start : rows.stop], self.seed, step, turn, self.batch_size
        )

    @override
    def losses(self, batch: Batch) -> Float[Tensor, " b"]:
        import torch

        noised, matched = self._noised(batch), self._matched(batch)
        masks = self._masks[list(batch.indices)].to(self.backbone.device)
        if not matched or self._matching is None:
            losses = self._errors(self._predict(batch, noised), noised, masks)
        else:
            pictures = [batch.indices[row] - self._rows["pdm"].start for row in matched]
            targets = self._matching.targets(noised, matched, pictures)
            prediction, queries = self._predict_with_queries(batch, noised)
            distances = query_losses(queries[matched], targets, masks[matched])
            # What the network predicts for these rows stays in the graph without a say, so that a process whose rows
            # are all of this kind has a gradient, of zero, for every weight that the others have one for.
            at = torch.tensor(matched, device=distances.device)
            losses = self._errors(prediction, noised, masks).index_put((at,), distances)
        return losses * losses.new_tensor([self._weight(i) for i in batch.indices])

    @override
    def export(self, folder: Path) -> None:
        export(self.backbone, self._trained, folder)

    def _matched(self, batch: Batch) -> list[int]:
        """The batch's rows whose queries are compared."""
        return [row for row, index in enumerate(batch.indices) if index in self._rows.get("pdm", ())]

    def _noised(self, batch: Batch) -> Noised:
        noised, matched = self._denoising.noised(batch), self._matched(batch)
        if not matched or self._matching is None:
            return noised
        return self._matching.redrawn(noised, matched, self._denoising.rngs(batch, Stream.TIMESTEP))

    def _predict(self, batch: Batch, noised: Noised) -> Float[Tensor, "b c h w"]:
        prompts = [self.example(i).prompt for i in batch.indices]
        text = self._texts.select(prompts) if self._texts else self.backbone.encode_prompts(prompts, together=True)
        condition = self.backbone.condition(text, [self._images.geometries[i] for i in batch.indices])
        return self.backbone.denoise(noised.x_t, noised.t, condition)

    def _predict_with_queries(
        self, batch: Batch, noised: Noised
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b tokens q"]]:
        assert self._matching
        return call_with_queries(self.backbone.denoiser, self._matching.layer, lambda: self._predict(batch, noised))

    def _errors(
        self, prediction: Float[Tensor, "b c h w"], noised: Noised, masks: Float[Tensor, "b 1 h w"]
    ) -> Float[Tensor, " b"]:
        """Each row's denoising loss: the mean over its mask."""
        errors = (prediction.float() - noised.target).square().mean(dim=1, keepdim=True)
        return self._denoising.weigh((errors * masks).sum(dim=(1, 2, 3)) / masks.sum(dim=(1, 2, 3)), noised)

    def _weight(self, index: int) -> float:
        """Such that the mean over a batch is the sum of the losses, each times its factor."""
        if index >= len(self.examples):
            return 1.0
        prior, pdm = self.config.prior, self.config.pdm
        weights: dict[Role, float] = {"instance": 1.0}
        if prior:
            weights["prior"] = prior.weight
        if pdm:
            weights["pdm"] = pdm.weight
        (weight,) = (weights[role] for role, rows in self._rows.items() if index in rows)
        return len(self._rows) * weight

    def _freeze_what_acts_after_the_queries(self) -> None:
        """Without any denoising loss nothing reaches these weights, and they are not trained."""
        import torch

        batch = Batch(0, (0,), (self._rows["pdm"].start,))
        _, queries = self._predict_with_queries(batch, self._noised(batch))
        parameters = [one for trained in self._trained.values() for one in trained.parameters().values()]
        found: Any = torch.autograd.grad(queries.float().sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.requires_grad = gradient is not None


def _in_rows(parts: Mapping[Role, Images], subject: Images) -> tuple[Images, dict[Role, range]]:
    """All losses' pictures one after another, then what is held out; and where each loss's are."""
    import torch

    from trainers.backbone import Moments
    from trainers.frozen import Images

    rows: dict[Role, range] = {}
    end = 0
    for role, part in parts.items():
        rows[role] = range(end, end := end + len(part.split.train))
    held_out = slice(len(subject.split.train), None)
    chosen = [(part, slice(len(part.split.train))) for part in parts.values()] + [(subject, held_out)]
    images = Images(
        replace(subject.split, train=tuple(one for part in parts.values() for one in part.split.train)),
        Moments(
            torch.cat([part.moments.mean[places] for part, places in chosen]),
            torch.cat([part.moments.logvar[places] for part, places in chosen]),
        ),
        tuple(one for part, places in chosen for one in part.geometries[places]),
    )
    return images, rows


def _find_masks(
    config: PdmboothConfig, frozen: Frozen, parts: Mapping[Role, Images], count: int
) -> Float[Tensor, "count 1 h w"]:
    """How much each latent of every row counts: all alike where a loss is not masked, and of what is held out."""
    import torch

    found: dict[int, Tensor] = {}
    masks: list[Tensor] = []
    for role, part in parts.items():
        examples, (height, width) = part.split.train, part.moments.mean.shape[2:]
        if config.masks is None or role not in config.masked:
            masks.append(torch.ones(len(examples), 1, height, width))
            continue
        if id(part) not in found:
            raw = config.masks.find(examples, frozen)
            found[id(part)] = fit_masks(raw, part.geometries[: len(examples)], (height, width), examples)
        masks.append(found[id(part)])
    rest = count - sum(map(len, masks))
    return torch.cat([*masks, torch.ones(rest, *masks[0].shape[1:])])
