"""SANA (Xie et al., 2024, arXiv:2410.10629): a linear-attention transformer that learns a flow."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from pydantic import PositiveInt, model_validator
from typing_extensions import override

from trainers.adapters.lora import set_lora_scale
from trainers.backbone import Backbone, Condition, Moments, TextEmbeddings
from trainers.errors import ConfigError, ModelError
from trainers.pretrained import PretrainedConfig

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    import torch
    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from trainers.backbone import SchedulerName
    from trainers.batch import Geometry
    from trainers.loss import Prediction
    from trainers.prompt import Prompt
    from trainers.version import Version, Versions

# The stock pipeline's `complex_human_instruction` (diffusers, Apache License 2.0), whose words released models know.
INSTRUCTION = """\
Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image \
generation. Evaluate the level of detail in the user prompt:
- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships \
to create vivid and concrete scenes.
- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.
Here are examples of how to transform or refine prompts:
- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully \
on a warm sunny windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, \
a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.
Please generate only the enhanced description for the prompt below and avoid including any additional commentary or \
evaluations:
User Prompt: """


class SanaConfig(PretrainedConfig):
    """A local folder, as `SanaPipeline.save_pretrained` writes it."""

    denoiser_name: ClassVar[str] = "transformer"
    component_classes: ClassVar = {"transformer": "SanaTransformer2DModel", "vae": "AutoencoderDC"}
    lora_targets: ClassVar = ("to_q", "to_k", "to_v")  # as diffusers' example has it
    trains_text: ClassVar = False
    schedulers: ClassVar = ("euler", "dpmpp_2m")

    kind: Literal["sana"] = "sana"
    instruction: str | None = None
    """What the text encoder reads before each prompt, in training and in sampling alike; none before a negative
    prompt. It must be the one that the model was trained with: null is the folder's `instruction.txt` or, where there
    is none, the stock pipeline's; empty is none."""
    max_sequence_length: PositiveInt = 300
    """Tokens of a prompt that the transformer sees; the rest is cut off."""

    @model_validator(mode="after")
    def _float16_is_not_used(self) -> Self:
        for name in ("vae_dtype", "text_encoder_dtype"):
            if getattr(self, name) == "float16":
                raise ValueError(f"{name} is float16, in which SANA's overflows; expected float32 or bfloat16")
        return self

    @property
    @override
    def downscale(self) -> int:
        return self.latent_pixels * self.component_config("transformer").get("patch_size", 1)

    @property
    def latent_pixels(self) -> int:
        """Pixels per latent, along each axis; the transformer may see several latents as one token."""
        return 2 ** (len(self.setting("vae", "encoder_block_out_channels")) - 1)

    @property
    def instruction_text(self) -> str:
        """What `instruction` means in this folder."""
        if self.instruction is not None:
            return self.instruction
        file = self.path / "instruction.txt"
        try:
            return file.read_text(encoding="utf-8") if file.is_file() else INSTRUCTION
        except UnicodeDecodeError as error:
            raise ModelError(f"{file}: not UTF-8 text; download it again") from error

    @property
    @override
    def prediction(self) -> Prediction:
        return "flow"

    @property
    @override
    def text_layers(self) -> Mapping[str, int]:
        return {}  # diffusers has no file that a trained Gemma could be saved in

    @property
    @override
    def text_options(self) -> tuple[str, ...]:
        return (*super().text_options, self.instruction_text, str(self.max_sequence_length))

    @property
    def shift(self) -> float:
        """How far training timesteps lean towards noise, under the name that the folder's scheduler gives it.

        Raises:
            ModelError: The folder's scheduler is not one of flows.
        """
        config = self.scheduler_config()
        name = str(config.get("_class_name"))
        if name.startswith("FlowMatch") and not config.get("use_dynamic_shifting"):
            return config.get("shift", 1.0)
        if config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas"):
            return config.get("flow_shift", 1.0)
        raise ModelError(
            f"{self.folder('scheduler')}/scheduler_config.json: {name} is not a sampler of flows with a fixed shift; "
            "expected FlowMatchEulerDiscreteScheduler, or use_flow_sigmas with prediction_type 'flow_prediction'"
        )

    @override
    def check(self) -> None:
        super().check()
        if self.shift <= 0:
            raise ModelError(f"{self.folder('scheduler')}/scheduler_config.json: shift is {self.shift}, expected > 0")
        config, file = self.component_config("transformer"), self.folder("transformer") / "config.json"
        latents = self.setting("vae", "latent_channels")
        width = self.setting("text_encoder", "hidden_size")
        for key, expected, meaning in (
            ("guidance_embeds", False, "SANA-Sprint, which is told its guidance, cannot be trained"),
            ("in_channels", latents, "the autoencoder's latent_channels"),
            ("out_channels", latents, "the autoencoder's latent_channels"),
            ("caption_channels", width, "the text encoder's hidden_size"),
        ):
            found = config.get(key) or False
            if found != expected:
                raise ModelError(f"{file}: {key} is {found}, expected {expected} ({meaning})")

    @override
    def load(self, device: torch.device, dtype: torch.dtype) -> Sana:
        self.check()
        return Sana(self, device, dtype)


class Sana(Backbone):
    """SANA's transformer, its deterministic autoencoder (DC-AE), and Gemma, whose last hidden states it reads."""

    def __init__(self, config: SanaConfig, device: torch.device, dtype: torch.dtype) -> None:
        import diffusers
        import torch
        from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
        from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
        from transformers import Gemma2Model, GemmaTokenizer

        from trainers.flow import Flow

        self.config, self.device, self.dtype = config, device, dtype
        half = torch.float32 if dtype == torch.float32 else torch.bfloat16
        text_dtype = getattr(torch, config.text_encoder_dtype) if config.text_encoder_dtype else half
        self._text_device = torch.device(config.text_encoder_device or device)
        vae_dtype, self._vae_device = getattr(torch, config.vae_dtype), torch.device(config.vae_device or device)
        self.denoiser = config.load_network(SanaTransformer2DModel, "transformer", dtype, device)
        self.vae = config.load_network(AutoencoderDC, "vae", vae_dtype, self._vae_device)
        self._encoder: Any = config.load_network(Gemma2Model, "text_encoder", text_dtype, torch.device("cpu"))
        self._tokenizer = config.load_tokenizer(GemmaTokenizer, "tokenizer", padding_side="right")
        self.text_encoders = (self._encoder,)
        self.pipeline = diffusers.SanaPipeline  # pyright: ignore[reportPrivateImportUsage]
        self.process = Flow(config.shift, config.num_timesteps)
        self._factor = float(cast("Any", self.vae).config.scaling_factor)
        self._latent_pixels = config.latent_pixels
        self._instruction = config.instruction_text
        self._scale = 1.0

    @property
    @override
    def networks(self) -> Mapping[str, nn.Module]:
        return {"transformer": self.denoiser}

    @override
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        pixels = self._latent_pixels
        return cast("Any", self.denoiser).config.in_channels, height // pixels, width // pixels

    @override
    def encode_image(self, pixels: Float[Tensor, "1 3 h w"]) -> Moments:
        import torch

        vae = cast("Any", self.vae.to(self._vae_device))
        with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
            mean = vae.encode(pixels.to(vae.device, vae.dtype), return_dict=False)[0].float().to(self.device)
        return Moments(mean, torch.full_like(mean, -torch.inf))

    @override
    def sample_latents(self, moments: Moments, noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return moments.mean * self._factor

    @override
    def encode_prompts(self, prompts: Sequence[str | None], *, together: bool = False) -> TextEmbeddings:
        import torch

        # Prompts are embedded one by one even then: those with and without an instruction differ in length.
        if together:
            return TextEmbeddings.cat([self._embed(prompt or "", asked=prompt is not None) for prompt in prompts])
        with torch.no_grad(), torch.autocast(self._text_device.type, enabled=False):
            return TextEmbeddings.cat([self._embed(prompt or "", asked=prompt is not None) for prompt in prompts])

    def _embed(self, prompt: str, *, asked: bool) -> TextEmbeddings:
        """One row; what is not `asked` for, a negative prompt, has no instruction before it."""
        self._encoder.to(self._text_device)
        instruction, length = self._instruction if asked else "", self.config.max_sequence_length
        # The stock pipeline's arithmetic: what the instruction takes, less the two tokens that are kept of it below.
        whole = length + (len(self._tokenizer.encode(instruction)) - 2 if instruction else 0)
        tokens = self._tokenizer(
            [instruction + prompt.lower().strip()],
            padding="max_length",
            max_length=whole,
            truncation=True,
            return_tensors="pt",
        ).to(self._text_device)
        hidden = self._encoder(tokens.input_ids, attention_mask=tokens.attention_mask, return_dict=False)[0]
        kept = [0, *range(1 - length, 0)]
        return TextEmbeddings(hidden[:, kept].to(self.device), mask=tokens.attention_mask[:, kept].to(self.device))

    @override
    def condition(self, text: TextEmbeddings, geometries: Sequence[Geometry]) -> Condition:
        return Condition(text.to(self.device))

    @override
    def prepare(
        self, prompts: Sequence[Prompt | None], height: int, width: int, *, negative: str | None = None
    ) -> Condition:
        import torch

        condition = super().prepare(prompts, height, width)
        if negative is not None and None in prompts:
            with torch.no_grad(), torch.autocast(self._text_device.type, enabled=False):
                unwanted = Condition(self._embed(negative, asked=False))
            rows = [unwanted if prompt is None else condition.select([row]) for row, prompt in enumerate(prompts)]
            condition = Condition.cat(rows)
        return Condition(condition.text.trimmed())

    @override
    def denoise(
        self, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"] | Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b c h w"]:
        if condition.extra:
            raise ConfigError(f"SANA's attention cannot be told {', '.join(condition.extra)}; use another method")
        if self.config.text_encoder_device is None and self._encoder.device.type != "cpu":
            # Gemma is larger than the denoiser: while that works, the device's memory is its own.
            self._encoder.to("cpu")
        return self.denoiser(
            x_t.to(self.dtype),
            encoder_hidden_states=condition.text.hidden.to(self.dtype),
            encoder_attention_mask=condition.text.mask,
            timestep=t * cast("Any", self.denoiser).config.timestep_scale,
            return_dict=False,
        )[0]

    @override
    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        import torch

        vae = cast("Any", self.vae.to(self._vae_device))
        with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
            return vae.decode((latents / self._factor).to(vae.device, vae.dtype), return_dict=False)[0].float()

    @override
    def sampling_scheduler(self, name: SchedulerName) -> Any:
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        from trainers.flow import FlowEuler

        shift, num_timesteps = self.config.shift, self.config.num_timesteps
        if name == "euler":
            return FlowEuler(num_train_timesteps=num_timesteps, shift=shift)
        if name == "dpmpp_2m":
            shipped = self.config.scheduler_config()
            flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
            solver = {"algorithm_type": "dpmsolver++", "solver_order": 2, "num_train_timesteps": num_timesteps}
            same = shipped if shipped.get("_class_name") == "DPMSolverMultistepScheduler" else {}
            return DPMSolverMultistepScheduler.from_config({**same, **flow, **solver})
        raise ConfigError(f"{name} draws from diffusion models; a flow expects {' or '.join(self.config.schedulers)}")

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
