import numpy as np
import pytest
import torch

from tests.trainers.conftest import build_sdxl
from trainers.backbones.sdxl import SdxlConfig
from trainers.errors import NonFiniteError
from trainers.guidance import SamplingConfig
from trainers.prompt import Prompt, Request
from trainers.sampling import generate, noise_rng

REQUESTS = [
    Request(Prompt(text="a red star"), 0),
    Request(Prompt(text="a red star"), 1),
    Request(Prompt(text="a ring on a blue background"), 0),
]
STEPS = 5
# A random model's pictures are nearly flat; this brings their contrast to that of real ones.
CONTRAST = 40.0
STOCK = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """A random SDXL folder whose pictures have contrast."""
    from diffusers import AutoencoderKL

    path = build_sdxl(tmp_path_factory.mktemp("models") / "sdxl", prediction_type=getattr(request, "param", "epsilon"))
    vae = AutoencoderKL.from_pretrained(path / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(CONTRAST)
    vae.save_pretrained(path / "vae")
    return path


@pytest.fixture(scope="module")
def backbone(folder):
    return SdxlConfig(path=folder).load(torch.device("cpu"), torch.float32)


def config(**changes):
    tree = {"resolution": 64, "steps": STEPS, "batch_size": len(REQUESTS), "guidance": {"kind": "cfg", "scale": 3.0}}
    return SamplingConfig.model_validate(tree | changes)


def pixels(backbone, requests=REQUESTS, **changes):
    return np.stack([np.asarray(sample.image) for sample in generate(backbone, requests, config(**changes))])


def stock_pixels(folder, *, scheduler="ddim", scale=3.0, negative_prompt=None, steps=STEPS):
    """The same pictures from diffusers' own pipeline, in one batch."""
    import diffusers

    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    options = {"clip_sample": False, "set_alpha_to_one": False} if scheduler == "ddim" else {}
    cls = getattr(diffusers, STOCK[scheduler])
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config, **options)
    images = pipeline(
        [request.prompt.text for request in REQUESTS],
        negative_prompt=None if negative_prompt is None else [negative_prompt] * len(REQUESTS),
        num_inference_steps=steps, guidance_scale=scale, height=64, width=64,
        generator=[noise_rng(request) for request in REQUESTS],
    ).images  # fmt: skip
    return np.stack([np.asarray(image) for image in images])


def levels_apart(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("folder", ["epsilon", "v_prediction"], indirect=True)
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmpp_2m"])
def test_pictures_are_the_stock_pipelines_within_one_level(scheduler, folder, backbone):
    ours, theirs = pixels(backbone, scheduler=scheduler), stock_pixels(folder, scheduler=scheduler)
    assert theirs.std() > 20
    assert levels_apart(ours, theirs) <= 1


@pytest.mark.parametrize("negative_prompt", [None, "", "blurry"])
def test_negative_prompts_mean_what_they_mean_to_the_stock_pipeline(negative_prompt, folder, backbone):
    ours = pixels(backbone, negative_prompt=negative_prompt)
    assert levels_apart(ours, stock_pixels(folder, negative_prompt=negative_prompt)) <= 1


def test_no_negative_prompt_is_zeros_and_not_the_empty_prompt_if_the_folder_says_so(folder, backbone):
    assert '"force_zeros_for_empty_prompt": true' in (folder / "model_index.json").read_text()
    assert levels_apart(pixels(backbone), pixels(backbone, negative_prompt="")) > 1


def test_guidance_scale_one_is_the_unguided_stock_pipeline(folder, backbone):
    ours = pixels(backbone, guidance={"kind": "cfg", "scale": 1.0})
    assert levels_apart(ours, stock_pixels(folder, scale=1.0)) <= 1


class Counting:
    """A backbone that counts the rows of denoiser calls and the prompts it encodes."""

    def __init__(self, backbone):
        self._backbone = backbone
        self.rows, self.prompts, self.decoded = [], [], []

    def __getattr__(self, name):
        return getattr(self._backbone, name)

    def denoise(self, x_t, t, condition):
        self.rows.append(len(x_t))
        return self._backbone.denoise(x_t, t, condition)

    def prepare(self, prompts, height, width, *, negative=None):
        self.prompts += prompts
        return self._backbone.prepare(prompts, height, width, negative=negative)

    def decode(self, latents):
        self.decoded.append(len(latents))
        return self._backbone.decode(latents)


@pytest.mark.parametrize(("scale", "rows"), [(3.0, 6), (1.0, 3), (0.0, 3)])
def test_each_step_is_one_call_without_the_terms_that_weigh_nothing(scale, rows, backbone):
    counting = Counting(backbone)
    pixels(counting, guidance={"kind": "cfg", "scale": scale})
    assert counting.rows == [rows] * STEPS


def test_each_distinct_prompt_is_encoded_once(backbone):
    counting = Counting(backbone)
    pixels(counting, batch_size=1)
    assert counting.prompts == [None, Prompt(text="a red star"), Prompt(text="a ring on a blue background")]


def test_a_batch_is_decoded_at_once(backbone):
    counting = Counting(backbone)
    pixels(counting, batch_size=2)
    assert counting.decoded == [2, 1]


def test_batch_size_and_company_change_nothing_but_rounding(backbone):
    together = pixels(backbone)
    one_by_one = pixels(backbone, batch_size=1)
    backwards = pixels(backbone, REQUESTS[::-1], batch_size=2)[::-1]
    alone = pixels(backbone, [REQUESTS[2]])[0]
    assert levels_apart(together, one_by_one) <= 1
    assert levels_apart(together, backwards) <= 1
    assert levels_apart(together[2], alone) <= 1


def test_pictures_come_in_the_order_they_were_asked_for(backbone):
    samples = list(generate(backbone, REQUESTS, config(batch_size=2)))
    assert [Request(sample.prompt, sample.seed) for sample in samples] == REQUESTS
    assert {(sample.image.mode, sample.image.size) for sample in samples} == {("RGB", (64, 64))}


def test_prompt_and_seed_both_matter_and_global_randomness_does_not(backbone):
    torch.manual_seed(1)
    first = pixels(backbone)
    torch.manual_seed(2)
    assert (pixels(backbone) == first).all()
    assert levels_apart(first[0], first[1]) > 10
    assert levels_apart(first[0], first[2]) > 1


def test_nothing_asked_is_nothing_drawn(backbone):
    assert list(generate(backbone, [], config())) == []


def test_autocast_of_the_caller_reaches_the_denoiser_but_not_the_latents(backbone):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = pixels(backbone)
    exact = pixels(backbone)
    assert 0 < np.abs(rough.astype(float) - exact).mean() < 8


def test_a_picture_with_nan_is_an_error_that_names_it(backbone):
    class Broken(Counting):
        def decode(self, latents):
            decoded = self._backbone.decode(latents)
            decoded[1, 0, 0, 0] = float("nan")
            return decoded

    with pytest.raises(NonFiniteError, match="the picture of 'a red star' with seed 1 has NaN"):
        pixels(Broken(backbone))


def test_no_two_prompts_share_their_latents():
    draws = [torch.randn(4, generator=noise_rng(Request(prompt, 0))) for prompt in ("a red star", "a blue star")]
    assert not torch.equal(*draws)
