"""A random SDXL folder small enough for unit tests, and pictures to train it on."""

# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportOperatorIssue=false

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

os.environ["HF_HUB_OFFLINE"] = "1"

TOKENS = 32
LATENT_CHANNELS = 12


def build_tokenizer() -> Any:
    """CLIP's, of single bytes."""
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPTokenizer

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TOKENS)


def build_sdxl(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Save a random model in the layout of a stock SDXL folder: 64-px pictures, 8x8 latents of 12 channels."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }

    def text_config(width: int) -> Any:
        return CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=37, num_attention_heads=4,
            num_hidden_layers=3, max_position_embeddings=TOKENS, projection_dim=width, hidden_act="gelu", **special,
        )  # fmt: skip

    unet = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, norm_num_groups=8,
        in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, transformer_layers_per_block=(1, 1),
        addition_embed_type="text_time", addition_time_embed_dim=8, cross_attention_dim=16 + 32,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=[8, 8, 8, 8], norm_num_groups=4, latent_channels=LATENT_CHANNELS, sample_size=64,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1,
        scaling_factor=0.7,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        timestep_spacing="leading", prediction_type=prediction_type,
    )  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=scheduler, tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=CLIPTextModel(text_config(16)), text_encoder_2=CLIPTextModelWithProjection(text_config(32)),
        add_watermarker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def v_prediction_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdxl(tmp_path_factory.mktemp("models") / "sdxl_v", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.trainers.models import build_sd

    return build_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def sd_v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.trainers.models import build_sd

    return build_sd(tmp_path_factory.mktemp("models") / "sd_v", prediction_type="v_prediction", seed=1)


@pytest.fixture(scope="session")
def refiner_folder(tmp_path_factory: pytest.TempPathFactory, sdxl_folder: Path) -> Path:
    from tests.trainers.models import build_refiner

    return build_refiner(tmp_path_factory.mktemp("models") / "refiner", sdxl_folder)


def draw(number: int, size: tuple[int, int] = (80, 64)) -> Image.Image:
    """A picture that differs for every number; `size` is (width, height)."""
    image = Image.new("RGB", size, (40 * number % 256, 90, 200 - 30 * number % 200))
    ImageDraw.Draw(image).ellipse((5 + number, 5, 40, 40), fill=(250, 20 * number % 256, 10))
    return image


def build_pictures(folder: Path, count: int = 6) -> Path:
    """`count` distinct captioned PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        draw(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a zog number {number}\n", encoding="utf-8")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return build_pictures(tmp_path / "pictures")


def short_training(model: Path, pictures: Path) -> dict[str, Any]:
    """The `train` section of a short trial of the tiny SDXL model."""
    return {
        "kind": "sdxl_lora",
        "backbone": {"kind": "sdxl", "path": str(model)},
        "data": {"kind": "folder", "path": str(pictures), "resolution": 64},
        "lora": {"rank": 4},
        "optimizer": {"kind": "adamw", "lr": 1e-2},
        "steps": 6,
        "batch_size": 4,
        "checkpoint_every": 2,
        "log_every": 2,
    }


@pytest.fixture
def make_config(sdxl_folder: Path, pictures: Path) -> Callable[..., Any]:
    """A short trial of the tiny model; keywords replace top-level keys."""

    def make(**changes: Any) -> Any:
        import trainers.methods  # noqa: F401, registers the kinds
        from trainers.method import MethodConfig

        return MethodConfig.model_validate({**short_training(sdxl_folder, pictures), **changes})

    return make


@pytest.fixture(name="accelerator")
def accelerator_fixture() -> Iterator[Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
