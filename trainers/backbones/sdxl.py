"""Stable Diffusion XL, base stage (Podell et al., 2023, arXiv:2307.01952), from a folder in diffusers' layout."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

from typing_extensions import override

from trainers.backbone import Backbone, BackboneConfig, Condition, Moments, TextEmbeddings
from trainers.config import LocalPath
from trainers.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from jaxtyping import Float, Int
    from torch import Tensor

    from trainers.backbone import SchedulerName
    from trainers.batch import Geometry

_WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""Stem of each network's weight file."""

_TOKENIZERS = ("tokenizer", "tokenizer_2")

_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Latents are not confined to [-1, 1], so DDIM's own defaults, made for pixels, would be wrong.
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
}
"""diffusers' class of each `SchedulerName`, and what must not come from the folder or from diffusers' defaults."""


class SdxlConfig(BackboneConfig):
    """A local SDXL base folder, as `StableDiffusionXLPipeline.save_pretrained` writes it."""

    kind: Literal["sdxl"] = "sdxl"
    path: LocalPath
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the autoencoder. The original SDXL autoencoder overflows in float16."""

    @override
    def check(self) -> None:
        if not self.path.is_dir():
            raise ModelError(f"{self.path}: no such folder; expected an SDXL base model in diffusers' layout")
        if not (self.path / "model_index.json").is_file():
            raise ModelError(f"{self.path}: no model_index.json; expected an SDXL base model in diffusers' layout")
        self.scheduler_config()
        for name in _WEIGHTS:
            self.component_config(name)
            self._weight_files(name)
        for name in _TOKENIZERS:
            self._tokenizer_files(name)
        _check_unet(self.path / "unet", self.component_config("unet"))

    @override
    def load(self, device: torch.device, dtype: torch.dtype) -> Sdxl:
        self.check()
        return Sdxl(self, device, dtype)

    @override
    def weight_shapes(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        files = {name: self._weight_files(name) for name in _WEIGHTS}
        return {
            name: {key: shape for file in parts if file.suffix == ".safetensors" for key, shape in _shapes(file)}
            for name, parts in files.items()
        }

    @override
    def image_files(self) -> tuple[Path, ...]:
        return self._network_files("vae")

    @override
    def text_files(self) -> tuple[Path, ...]:
        networks = (*self._network_files("text_encoder"), *self._network_files("text_encoder_2"))
        tokenizers = (file for name in _TOKENIZERS for file in self._tokenizer_files(name))
        return (self.path / "model_index.json", *networks, *tokenizers)

    @property
    @override
    def downscale(self) -> int:
        return 2 ** (len(self.component_config("vae")["block_out_channels"]) - 1)

    @property
    def zeros_for_null(self) -> bool:
        """Whether the model was trained to take zero embeddings, not the empty prompt, for no prompt."""
        index = _read_json(self.path / "model_index.json")
        return index.get("force_zeros_for_empty_prompt", True)  # the stock pipeline's default

    def variant(self, component: str) -> str | None:
        """`fp16` if the component comes in that precision only."""
        stem = _WEIGHTS[component]
        return None if _weights(self.path / component, f"{stem}.safetensors") else "fp16"

    def component_config(self, component: str) -> dict[str, Any]:
        """A component's `config.json`."""
        return _read_json(self.path / component / "config.json")

    def scheduler_config(self) -> dict[str, Any]:
        """The folder's `scheduler_config.json`."""
        return _read_json(self.path / "scheduler" / "scheduler_config.json")

    def _network_files(self, component: str) -> tuple[Path, ...]:
        return (self.path / component / "config.json", *self._weight_files(component))

    def _weight_files(self, component: str) -> tuple[Path, ...]:
        folder, stem = self.path / component, _WEIGHTS[component]
        files = _weights(folder, f"{stem}.safetensors") or _weights(folder, f"{stem}.fp16.safetensors")
        if not files:
            raise ModelError(f"{folder}: no {stem}.safetensors, nor {stem}.fp16.safetensors; is the download complete?")
        return files

    def _tokenizer_files(self, component: str) -> tuple[Path, ...]:
        folder = self.path / component
        names = {file.name for file in folder.iterdir()} if folder.is_dir() else set[str]()
        if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
            raise ModelError(f"{folder}: no tokenizer.json, nor vocab.json and merges.txt; is the download complete?")
        return tuple(folder / name for name in sorted(names) if name.endswith((".json", ".txt")))


class Sdxl(Backbone):
    """SDXL's UNet, autoencoder and two text encoders."""

    def __init__(self, config: SdxlConfig, device: torch.device, dtype: torch.dtype) -> None:
        import torch
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        from trainers.diffusion import NoiseProcess

        def network(cls: Any, name: str, dtype: torch.dtype) -> Any:
            options = {"subfolder": name, "variant": config.variant(name), "use_safetensors": True}
            model = cls.from_pretrained(config.path, dtype=dtype, local_files_only=True, **options)
            return model.requires_grad_(False).eval().to(device)

        self.device, self.dtype = device, dtype
        self.denoiser = network(UNet2DConditionModel, "unet", dtype)
        self.vae = network(AutoencoderKL, "vae", getattr(torch, config.vae_dtype))
        self.text_encoders = (
            network(CLIPTextModel, "text_encoder", dtype),
            network(CLIPTextModelWithProjection, "text_encoder_2", dtype),
        )
        self._tokenizers = [cast("Any", CLIPTokenizer).from_pretrained(config.path / name) for name in _TOKENIZERS]
        self._scheduler_config = config.scheduler_config()
        self.process = NoiseProcess.from_scheduler_config(self._scheduler_config).to(device)
        self._zeros_for_null = config.zeros_for_null
        self._downscale = config.downscale
        self._scale = 1.0
        self._shift, self._factor = _latent_statistics(cast("Any", self.vae).config, device)

    @override
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return cast("Any", self.denoiser).config.in_channels, height // self._downscale, width // self._downscale

    @override
    def encode_image(self, pixels: Float[Tensor, "1 3 h w"]) -> Moments:
        import torch

        vae = cast("Any", self.vae)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        return Moments(posterior.mean.float(), posterior.logvar.float())

    @override
    def sample_latents(self, moments: Moments, noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return (moments.mean + (0.5 * moments.logvar).exp() * noise - self._shift) * self._factor

    @override
    def encode_prompts(self, prompts: Sequence[str | None], *, together: bool = False) -> TextEmbeddings:
        import torch

        if together:
            return self._encode(list(prompts))
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return TextEmbeddings.cat([self._encode([prompt]) for prompt in prompts])

    def _encode(self, prompts: list[str | None]) -> TextEmbeddings:
        import torch

        texts = [prompt or "" for prompt in prompts]
        outputs: list[Any] = []
        for tokenizer, encoder in zip(self._tokenizers, self.text_encoders, strict=True):
            length = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
            tokens = tokenizer(texts, return_tensors="pt", **length).input_ids.to(self.device)
            outputs.append(encoder(tokens, output_hidden_states=True))
        # SDXL was trained on penultimate states, before the final norm.
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[-1].text_embeds
        if self._zeros_for_null and None in prompts:
            given = torch.tensor([[prompt is not None] for prompt in prompts], dtype=hidden.dtype, device=self.device)
            hidden, pooled = hidden * given[:, :, None], pooled * given
        return TextEmbeddings(hidden, pooled)

    @override
    def condition(self, text: TextEmbeddings, geometries: Sequence[Geometry]) -> Condition:
        import torch

        rows = [(*geometry.original, *geometry.crop, *geometry.target) for geometry in geometries]
        # As in the stock pipeline, sizes have the embeddings' precision.
        time_ids = torch.tensor(rows, dtype=text.hidden.dtype, device=self.device)
        return Condition(text.hidden.to(self.device), text.pooled.to(self.device), time_ids)

    @override
    def denoise(
        self, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"] | Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b c h w"]:
        added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
        return self.denoiser(x_t.to(self.dtype), t, condition.hidden, added_cond_kwargs=added, return_dict=False)[0]

    @override
    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        import torch

        vae = cast("Any", self.vae)
        unscaled = (latents.float() / self._factor + self._shift).to(vae.dtype)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return vae.decode(unscaled, return_dict=False)[0].float()

    @override
    def sampling_scheduler(self, name: SchedulerName) -> Any:
        import diffusers

        cls, options = _SCHEDULERS[name]
        return getattr(diffusers, cls).from_config(self._scheduler_config, **options)

    @override
    def load_adapter(self, folder: Path) -> None:
        from trainers.adapters.lora import load_lora

        names = ("unet", "text_encoder", "text_encoder_2")
        load_lora(folder, dict(zip(names, (self.denoiser, *self.text_encoders), strict=True)))

    @override
    @contextmanager
    def adapter_scale(self, scale: float) -> Generator[None]:
        previous = self._scale
        self._set_scale(scale)
        try:
            yield
        finally:
            self._set_scale(previous)

    def _set_scale(self, scale: float) -> None:
        from peft.tuners.lora import LoraLayer

        self._scale = scale
        for network in (self.denoiser, *self.text_encoders):
            for layer in network.modules():
                if isinstance(layer, LoraLayer):
                    layer.set_scale("default", scale)  # PEFT's name of a model's only adapter


def _latent_statistics(config: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shift and factor that bring raw latents to what the denoiser expects, broadcastable to [b, c, h, w]."""
    import torch

    # Folders of SDXL's kind may carry statistics per channel, which the stock pipeline applies on decoding.
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    shift = torch.tensor(mean or [0.0], dtype=torch.float32, device=device).view(1, -1, 1, 1)
    spread = torch.tensor(std or [1.0], dtype=torch.float32, device=device).view(1, -1, 1, 1)
    return shift, config.scaling_factor / spread


def _check_unet(folder: Path, config: dict[str, Any]) -> None:
    if config.get("addition_embed_type") != "text_time":
        raise ModelError(f"{folder}/config.json: addition_embed_type is not 'text_time'; expected an SDXL UNet")
    encoder = _read_json(folder.parent / "text_encoder_2" / "config.json")
    expected = encoder.get("projection_dim", 512) + 6 * config["addition_time_embed_dim"]
    found = config["projection_class_embeddings_input_dim"]
    if found != expected:
        raise ModelError(
            f"{folder}/config.json: projection_class_embeddings_input_dim is {found}, expected {expected} (six sizes); "
            "is this the refiner? Only the base model can be trained"
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected an SDXL base model in diffusers' layout")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error}); download it again") from error


def _weights(folder: Path, name: str) -> tuple[Path, ...]:
    """The weight file `name`, or its shards; empty if it is missing or any shard is."""
    if (folder / name).is_file():
        return (folder / name,)
    stem, _, variant = name.removesuffix(".safetensors").partition(".")
    index = folder / ".".join(filter(None, [stem, "safetensors.index", variant, "json"]))
    if not index.is_file():
        return ()
    shards = tuple(folder / shard for shard in sorted(set(_read_json(index)["weight_map"].values())))
    return (index, *shards) if all(shard.is_file() for shard in shards) else ()


def _shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor in a safetensors file, from its header: a length, then JSON."""
    with file.open("rb") as stream:
        header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, tuple(entry["shape"])
