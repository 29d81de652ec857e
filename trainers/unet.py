"""What Stable Diffusion's generations share: a UNet that is told prompts by CLIP, and a KL autoencoder."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args

from typing_extensions import override

from trainers.adapters.lora import UNET_TARGETS, set_lora_scale
from trainers.backbone import Backbone, Moments, TextEmbeddings
from trainers.errors import ConfigError, ModelError
from trainers.pretrained import PretrainedConfig

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    import torch
    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from trainers.backbone import Condition, SchedulerName
    from trainers.loss import Prediction
    from trainers.version import Version, Versions

_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Latents are not confined to [-1, 1], so DDIM's own defaults, made for pixels, would be wrong.
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
}
"""diffusers' class of each `SchedulerName`, and what must not come from the folder or from diffusers' defaults."""

UnetPrediction = Literal["epsilon", "v_prediction"]
"""What a UNet of this family may be trained to predict."""


class UnetConfig(PretrainedConfig):
    """A folder with a UNet, a KL autoencoder and CLIP text encoders."""

    lora_targets: ClassVar = UNET_TARGETS
    component_classes: ClassVar = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    added_embeddings: ClassVar[str | None]
    """The UNet's `addition_embed_type`."""

    prediction_type: UnetPrediction | None = None
    """What the UNet is to predict; null is what the folder's scheduler says."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that nothing is left of the picture at its end (Lin et al., 2023,
    arXiv:2305.08891). The UNet must predict the velocity."""

    @property
    @override
    def downscale(self) -> int:
        return 2 ** (len(self.setting("vae", "block_out_channels")) - 1)

    @property
    @override
    def prediction(self) -> Prediction:
        return self.scheduler_config().get("prediction_type", "epsilon")

    @override
    def check(self) -> None:
        super().check()
        self._check_process()
        latents = self.setting("vae", "latent_channels")
        for key, expected, meaning in (
            ("addition_embed_type", self.added_embeddings, "kind: sd is Stable Diffusion 1 and 2, kind: sdxl is SDXL"),
            ("in_channels", latents, "the autoencoder's latent_channels; UNets that inpaint or upscale see more"),
            ("out_channels", latents, "the autoencoder's latent_channels"),
            ("cross_attention_dim", self._text_width(), f"the width of {' and '.join(self.text_encoder_names)}"),
            ("class_embed_type", None, "a UNet that is told classes cannot be trained"),
            ("encoder_hid_dim_type", None, "a UNet that projects its prompts cannot be trained"),
            ("time_cond_proj_dim", None, "a UNet that is told its guidance cannot be trained"),
        ):
            found = self.component_config("unet").get(key)
            if found != expected:
                file = self.folder("unet") / "config.json"
                raise ModelError(f"{file}: {key} is {found}, expected {expected} ({meaning})")

    def _check_process(self) -> None:
        config, file = self.scheduler_config(), self.folder("scheduler") / "scheduler_config.json"
        if self.prediction not in get_args(UnetPrediction) or not {"beta_start", "trained_betas"} & config.keys():
            raise ModelError(
                f"{file}: {config.get('_class_name')} with prediction_type {self.prediction!r} and "
                f"{'' if 'beta_start' in config else 'no '}betas; expected a diffusion model that predicts one of "
                f"{', '.join(get_args(UnetPrediction))}"
            )
        if config.get("rescale_betas_zero_snr") and self.prediction == "epsilon":
            raise ConfigError(
                f"train.backbone: zero terminal SNR (here or in {file}) with a UNet that predicts noise, which is all "
                "there is at the last timestep; set prediction_type: v_prediction, or zero_terminal_snr: false"
            )

    def _text_width(self) -> int:
        return sum(self.setting(name, "hidden_size") for name in self.text_encoder_names)

    @override
    def scheduler_config(self) -> dict[str, Any]:
        """The folder's file, with what this configuration says otherwise."""
        config = super().scheduler_config()
        if self.prediction_type is not None:
            config["prediction_type"] = self.prediction_type
        if self.zero_terminal_snr:
            config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return config


class UnetBackbone(Backbone):
    """A UNet, its autoencoder and its text encoders."""

    text_classes: ClassVar[Mapping[str, str]]
    """transformers' class of each text encoder."""

    def __init__(self, config: UnetConfig, device: torch.device, dtype: torch.dtype) -> None:
        import torch
        import transformers
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        from trainers.diffusion import Diffusion

        self.config, self.device, self.dtype = config, device, dtype
        text_dtype = getattr(torch, config.text_encoder_dtype) if config.text_encoder_dtype else dtype
        self._text_device = torch.device(config.text_encoder_device or device)
        vae_dtype, self._vae_device = getattr(torch, config.vae_dtype), torch.device(config.vae_device or device)
        self.denoiser = config.load_network(UNet2DConditionModel, "unet", dtype, device)
        self.vae = config.load_network(AutoencoderKL, "vae", vae_dtype, self._vae_device)
        self.text_encoders = tuple(
            config.load_network(getattr(transformers, self.text_classes[name]), name, text_dtype, self._text_device)
            for name in config.text_encoder_names
        )
        self._tokenizers = [config.load_tokenizer(transformers.CLIPTokenizer, name) for name in config.tokenizer_names]
        self.process = Diffusion.from_scheduler_config(config.scheduler_config()).to(device)
        self._downscale = config.downscale
        self._scale = 1.0
        self._shift, self._factor = _latent_statistics(cast("Any", self.vae).config, device)

    @property
    @override
    def networks(self) -> Mapping[str, nn.Module]:
        return {"unet": self.denoiser, **dict(zip(self.config.text_encoder_names, self.text_encoders, strict=True))}

    @override
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return cast("Any", self.denoiser).config.in_channels, height // self._downscale, width // self._downscale

    @override
    def encode_image(self, pixels: Float[Tensor, "1 3 h w"]) -> Moments:
        import torch

        vae = cast("Any", self.vae.to(self._vae_device))
        with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return Moments(posterior.mean.float().to(self.device), posterior.logvar.float().to(self.device))

    @override
    def sample_latents(self, moments: Moments, noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return (moments.mean + (0.5 * moments.logvar).exp() * noise - self._shift) * self._factor

    @override
    def encode_prompts(self, prompts: Sequence[str | None], *, together: bool = False) -> TextEmbeddings:
        import torch

        if together:
            return self.embed(list(prompts))
        with torch.no_grad(), torch.autocast(self._text_device.type, enabled=False):
            return TextEmbeddings.cat([self.embed([prompt]) for prompt in prompts])

    @abstractmethod
    def embed(self, prompts: list[str | None]) -> TextEmbeddings:
        """Embed all prompts in one forward pass."""

    def encode(self, texts: list[str]) -> list[Any]:
        """What each text encoder answers, hidden states included."""
        outputs: list[Any] = []
        for tokenizer, encoder in zip(self._tokenizers, self.text_encoders, strict=True):
            length = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
            tokens = tokenizer(texts, return_tensors="pt", **length).input_ids.to(self._text_device)
            outputs.append(encoder.to(self._text_device)(tokens, output_hidden_states=True))
        return outputs

    @override
    def denoise(
        self, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"] | Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b c h w"]:
        text, sizes = condition.text, condition.sizes
        added = None if sizes is None else {"text_embeds": text.pooled, "time_ids": sizes}
        return self.denoiser(
            x_t.to(self.dtype),
            t,
            text.hidden.to(self.dtype),
            added_cond_kwargs=added,
            cross_attention_kwargs=dict(condition.extra) or None,
            return_dict=False,
        )[0]

    @override
    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        import torch

        vae = cast("Any", self.vae.to(self._vae_device))
        unscaled = (latents.float() / self._factor + self._shift).to(vae.device, vae.dtype)
        with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
            return vae.decode(unscaled, return_dict=False)[0].float()

    @override
    def sampling_scheduler(self, name: SchedulerName) -> Any:
        import diffusers

        cls, options = _SCHEDULERS[name]
        return getattr(diffusers, cls).from_config(self.config.scheduler_config(), **options)

    @override
    def versions(self, wanted: Sequence[Version]) -> Versions:
        from trainers.whole import own_versions

        return own_versions(self, wanted) or super().versions(wanted)

    @override
    def untrained(self, name: str) -> nn.Module:
        return self.config.load_again(self.networks[name], name)

    @override
    @contextmanager
    def adapter_scale(self, scale: float) -> Generator[None]:
        previous, self._scale = self._scale, scale
        set_lora_scale(self.networks.values(), scale)
        try:
            yield
        finally:
            self._scale = previous
            set_lora_scale(self.networks.values(), previous)


def _latent_statistics(config: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shift and factor that bring raw latents to what the denoiser expects, broadcastable to [b, c, h, w]."""
    import torch

    # Folders of SDXL's kind may carry statistics per channel, which the stock pipeline applies on decoding.
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    shift = torch.tensor(mean or [0.0], dtype=torch.float32, device=device).view(1, -1, 1, 1)
    spread = torch.tensor(std or [1.0], dtype=torch.float32, device=device).view(1, -1, 1, 1)
    return shift, config.scaling_factor / spread
