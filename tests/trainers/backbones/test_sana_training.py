"""A training step of SANA next to one written out as in diffusers' `train_dreambooth_lora_sana.py`."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

from tests.trainers.models import INSTRUCTION, build_sana
from trainers.backbone import TextEmbeddings
from trainers.backbones.sana import SanaConfig
from trainers.batch import Batch, Geometry
from trainers.cache import Cache
from trainers.frozen import Frozen, encode_texts


@pytest.fixture
def folder(tmp_path):
    return build_sana(tmp_path / "sana", euler=True)


@pytest.fixture
def method(make_config, folder, pictures, accelerator):
    config = make_config(
        kind="dreambooth",
        backbone={"kind": "sana", "path": str(folder), "instruction": INSTRUCTION, "max_sequence_length": 24},
        data={"kind": "folder", "path": str(pictures), "resolution": 64, "instance_prompt": "A photo of a Zog"},
    )
    return config.build(0, None, accelerator)


def test_losses_equal_the_examples(method, folder):
    batch = Batch(0, (0, 1, 2, 3), (0, 1, 2, 3))
    noised = method._denoising.noised(batch)
    pipeline = SanaPipeline.from_pretrained(folder, local_files_only=True)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    with torch.no_grad():
        embeddings, mask, _, _ = pipeline.encode_prompt(
            ["A photo of a Zog"] * 4, max_sequence_length=24, complex_human_instruction=INSTRUCTION.split("\n")
        )
        pixels = torch.cat([method.data.read(example).pixels for example in method.examples[:4]])
        latents = pipeline.vae.encode(pixels).latent * pipeline.vae.config.scaling_factor
        indices = [int((scheduler.timesteps - t).abs().argmin()) for t in noised.t]
        timesteps, sigmas = scheduler.timesteps[indices], scheduler.sigmas[indices].view(4, 1, 1, 1)
        noisy = (1.0 - sigmas) * latents + sigmas * noised.noise
        prediction = pipeline.transformer(noisy, embeddings, timesteps, encoder_attention_mask=mask, return_dict=False)[
            0
        ]
        expected = (prediction - (noised.noise - latents)).square().reshape(4, -1).mean(1)
        torch.testing.assert_close(timesteps, noised.t)
        torch.testing.assert_close(method.losses(batch), expected, atol=1e-5, rtol=1e-5)


def test_what_is_trained_is_counted_without_torch(method):
    trained = method.trained()["transformer"].parameters()
    assert method.config.num_trainable() == sum(value.numel() for value in trained.values())
    assert {name.split(".")[-4] for name in trained} == {"to_q", "to_k", "to_v"}


def test_padding_of_all_prompts_is_dropped_once_which_changes_no_prediction(method):
    backbone, prompts = method.backbone, [None, "a", "a longer one"]
    whole = backbone.encode_prompts(prompts)
    short = whole.trimmed()
    assert whole.hidden.shape[1] == whole.mask.shape[1] == 24
    # The first token, the instruction's last one, and a letter each.
    assert short.mask.sum(dim=1).tolist() == whole.mask.sum(dim=1).tolist() == [1, 3, 14]
    assert short.hidden.shape[1] == 14
    x_t, t = torch.randn(3, *backbone.latent_shape(64, 64)), torch.tensor([100.0, 500.0, 900.0])
    sizes = [Geometry.whole(64, 64)] * 3
    torch.testing.assert_close(
        backbone.denoise(x_t, t, backbone.condition(short, sizes)),
        backbone.denoise(x_t, t, backbone.condition(whole, sizes)),
    )


def test_embeddings_without_a_mask_are_not_trimmed():
    text = TextEmbeddings(torch.zeros(1, 4, 2))
    assert text.trimmed() is text


@pytest.mark.parametrize(
    "options", [{"instruction": "other"}, {"max_sequence_length": 30}, {"text_encoder_dtype": "bfloat16"}]
)
def test_what_changes_embeddings_is_never_answered_from_the_cache_of_another(folder, accelerator, tmp_path, options):
    def embed(**changes):
        config = SanaConfig(path=folder, **{"instruction": INSTRUCTION, "max_sequence_length": 24, **changes})
        frozen = Frozen(config, config.load(torch.device("cpu"), torch.float32), Cache(tmp_path), accelerator)
        return encode_texts(frozen, ["b" * 40]).embeddings.tensors()

    plain, changed = embed(), embed(**options)
    assert not all(torch.equal(plain[name], changed[name]) for name in plain)


class Elsewhere:
    """A text encoder on an accelerator, as far as one can be had without."""

    device = torch.device("cuda")
    moved = None

    def to(self, device):
        self.moved = device


@pytest.mark.parametrize(("asked", "moved"), [(None, "cpu"), ("cuda:1", None)])
def test_gemma_leaves_the_transformers_device_unless_it_has_one_of_its_own(folder, asked, moved):
    config = SanaConfig(path=folder, instruction="", max_sequence_length=24)
    backbone = config.load(torch.device("cpu"), torch.float32)
    condition = backbone.condition(backbone.encode_prompts(["a"]), [Geometry.whole(64, 64)])
    backbone.config = config.model_copy(update={"text_encoder_device": asked})
    backbone._encoder = Elsewhere()
    backbone.denoise(torch.zeros(1, *backbone.latent_shape(64, 64)), torch.tensor([500.0]), condition)
    assert backbone._encoder.moved == moved
