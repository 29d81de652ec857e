"""Options of the loop and of the backbone, each on one method."""

# pyright: basic, reportPrivateImportUsage=false, reportOptionalSubscript=false, reportArgumentType=false

import itertools

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file

from tests.contracts.method import InterruptionError, interrupt, load_state, losses, weights
from trainers.batch import Batch, Geometry
from trainers.errors import ConfigError, DataError
from trainers.guidance import SamplingConfig
from trainers.loop import fit
from trainers.prompt import Prompt, Request
from trainers.rundir import RunDir
from trainers.sampling import generate
from trainers.validation import validation_batches

FOUR = Batch(0, (0, 1, 2, 3), (0, 1, 2, 3))
SAMPLES = {"every": 4, "prompts": ["a zog", "a dax"], "seeds": [1, 2], "resolution": 64, "steps": 2}
CONSTANT = {"kind": "constant"}
AVERAGED = {
    "ema": {"ema": {"decay": 0.9}},
    "schedule_free": {"optimizer": {"kind": "schedule_free", "lr": 1e-2}, "schedule": CONSTANT},
}


@pytest.fixture
def held_out(pictures):
    return {"kind": "folder", "path": str(pictures), "resolution": 64, "holdout": 2}


@pytest.fixture
def train(make_config, accelerator, tmp_path):
    """Train a fresh method; returns it and its run."""
    numbers = itertools.count()

    def train(prepare=lambda method: None, run=None, **changes):
        config = make_config(**changes)
        run = run or RunDir(tmp_path / f"run{next(numbers)}")
        method = config.build(0, None, accelerator)
        prepare(method)
        fit(method, config, run, accelerator)
        return method, run

    return train


def events(run, kind):
    return [event for _, event in run.read_events() if event["event"] == kind]


def spy(history):
    """Notes the weights before every step."""

    def prepare(method):
        method_losses = method.losses

        def noting(batch):
            if batch.levels is None:
                history[batch.step] = weights(method)
            return method_losses(batch)

        method.losses = noting

    return prepare


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_average_of_all_steps_is_left_behind_as_diffusers_would(train):
    history = {}
    method, run = train(spy(history), ema={"decay": 0.3})
    history[6] = load_state(run)["parameters"]
    oracle = EMAModel([value.clone() for value in history[0].values()], decay=0.3)
    for step in range(1, 7):
        oracle.step([value.requires_grad_() for value in history[step].values()])
    for (name, value), expected in zip(weights(method).items(), oracle.shadow_params, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
        assert not torch.equal(value, history[6][name])


@pytest.mark.parametrize("kind", AVERAGED)
def test_what_is_exported_and_drawn_is_the_average(train, kind):
    method, run = train(samples=SAMPLES, **AVERAGED[kind])
    assert not same(load_state(run)["parameters"], weights(method))
    config = SamplingConfig(resolution=64, steps=2)
    request = Request(Prompt(text="a dax"), 2)
    (sample,) = generate(method.backbone, [request], config)
    drawn = Image.open(run.path / events(run, "samples")[-1]["files"][3])
    levels = np.abs(np.asarray(drawn, dtype=int) - np.asarray(sample.image, dtype=int))
    assert levels.max() <= 1, "it was drawn in a batch of several, which rounds differently on some processors"


RESUMED = {
    **AVERAGED,
    "prodigy": {"optimizer": {"kind": "prodigy", "d0": 1e-4}},
    "adafactor": {"optimizer": {"kind": "adafactor", "lr": 0.1}},
    "dora": {"lora": {"rank": 4, "dora": True}},
    "gradient_checkpointing": {"gradient_checkpointing": True, "text_encoder_lora": {"rank": 2}},
    "looked_at": {"samples": {**SAMPLES, "every": 1}, "weak_fraction": 0.5},
}


@pytest.mark.parametrize("option", RESUMED)
def test_interrupted_and_resumed_equals_uninterrupted(train, tmp_path, option):
    changes = RESUMED[option]
    whole, run = train(**changes)
    halves = RunDir(tmp_path / "halves")
    with pytest.raises(InterruptionError):
        train(lambda method: interrupt(method, 5), halves, **changes)
    resumed, _ = train(run=halves, **changes)
    assert same(weights(whole), weights(resumed))
    assert losses(run) == losses(halves)
    again, _ = train(run=halves, **changes)
    assert same(weights(whole), weights(again)), "a finished run is left with what is judged, too"


@pytest.mark.parametrize("option", ["dora", "rank_stabilized"])
def test_every_weight_of_the_adapter_is_trained(train, option):
    history = {}
    method, _ = train(spy(history), lora={"rank": 4, option: True}, text_encoder_lora={"rank": 2, option: True})
    after = weights(method)
    assert any("magnitude" in name for name in after) == (option == "dora")
    assert not [name for name in after if torch.equal(after[name], history[0][name])]


@pytest.mark.parametrize(("dora", "stable"), [(True, False), (False, True), (True, True)])
def test_variants_of_lora_predict_the_same_in_the_stock_pipeline(
    make_config, accelerator, tmp_path, sdxl_folder, dora, stable
):
    lora = {"rank": 4, "alpha": 1.5, "dora": dora, "rank_stabilized": stable}
    method = make_config(lora=lora, text_encoder_lora=lora).build(0, None, accelerator)
    rng = torch.Generator().manual_seed(5)
    for value in (value for one in method.trained().values() for value in one.parameters().values()):
        value.data += torch.randn(value.shape, generator=rng) * 0.2
    method.export(tmp_path / "adapter")
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, local_files_only=True)
    base = draw(pipeline)
    pipeline.load_lora_weights(tmp_path / "adapter", adapter_name="default")
    for name, one in method.trained().items():
        theirs = getattr(pipeline, name).peft_config["default"]
        assert (theirs.use_dora, theirs.use_rslora) == (dora, stable)
        assert theirs.lora_alpha == one.network.peft_config["default"].lora_alpha == 1.5
    ours = predict(method.backbone)
    torch.testing.assert_close(ours, draw(pipeline), atol=1e-5, rtol=0)
    assert not torch.allclose(ours, base, atol=1e-2)
    with method.backbone.adapter_scale(0.0):
        torch.testing.assert_close(predict(method.backbone), base, atol=1e-5, rtol=0)
    assert torch.equal(predict(method.backbone), ours)


def x_t():
    return torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([7, 700])


def draw(pipeline):
    with torch.no_grad():
        text = pipeline.encode_prompt(["a", "b"], do_classifier_free_guidance=False)
        added = {"text_embeds": text[2], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
        return pipeline.unet(*x_t(), text[0], added_cond_kwargs=added).sample


def predict(backbone):
    with torch.no_grad():
        condition = backbone.condition(backbone.encode_prompts(["a", "b"]), [Geometry.whole(64, 64)] * 2)
        return backbone.denoise(*x_t(), condition)


def test_looking_at_a_training_does_not_change_it(train, held_out):
    plain, run = train(data=held_out)
    looked, watched = train(
        data=held_out, validation={"every": 1, "draws": 2}, samples={**SAMPLES, "every": 2}, weak_fraction=0.4
    )
    assert same(weights(plain), weights(looked))
    assert same(load_state(run)["parameters"], load_state(watched)["parameters"])
    assert losses(run) == losses(watched)


def test_validation_is_repeated_on_the_same_noise_and_drops_no_captions(train, held_out):
    still = {"kind": "adamw", "lr": 1e-30}
    validation = {"every": 2, "draws": 3}
    (_, one), (_, other) = (
        train(data=held_out, optimizer=still, validation=validation, caption_dropout=dropout) for dropout in (0.0, 1.0)
    )
    logged = [event["loss"] for run in (one, other) for event in events(run, "validation")]
    assert [event["step"] for event in events(one, "validation")] == [2, 4, 6]
    assert len(set(logged)) == 1


def test_the_validation_loss_is_the_mean_over_held_out_pictures_and_even_noise_levels(train, held_out):
    validation = {"every": 6, "draws": 4}
    method, run = train(data=held_out, validation=validation)
    batches = validation_batches(method, 4, 3)
    assert [len(batch.indices) for batch in batches] == [3, 3, 2]
    rows = [row for batch in batches for row in zip(batch.indices, batch.levels, strict=True)]
    seen = sorted((index, int(level * 4)) for index, level in rows)
    assert seen == [(index, stratum) for index in (4, 5) for stratum in range(4)]
    with torch.no_grad():
        expected = float(torch.cat([method.losses(batch) for batch in batches]).mean())
    assert events(run, "validation")[0]["loss"] == pytest.approx(expected, rel=1e-5)
    # Row 4 is the first held-out picture: trained on, it would have the same loss for the same latents and noise.
    alone = Batch(0, batches[0].places[:1], (4,), (0.1,))
    other = Batch(0, batches[0].places[:1], (5,), (0.1,))
    with torch.no_grad():
        assert not torch.equal(method.losses(alone), method.losses(other))


def test_held_out_pictures_without_captions_cannot_be_validated_on(train, held_out, accelerator):
    from dataclasses import replace

    def silence(method):
        method.held_out = (replace(method.held_out[0], prompt=""), method.held_out[1])

    with pytest.raises(DataError, match=r"has no caption, as 1 of 2 held-out"):
        train(silence, data=held_out, validation={"every": 2})


def test_samples_are_drawn_on_time_under_the_prompts_order(train):
    _, run = train(samples=SAMPLES)
    first, last = events(run, "samples")
    assert (first["step"], last["step"]) == (4, 6)
    assert last["files"] == [f"samples/step-0000006/{place}_{seed}.png" for place in ("00", "01") for seed in (1, 2)]
    pictures = [Image.open(run.path / file).tobytes() for file in last["files"]]
    assert len(set(pictures)) == 4
    assert Image.open(run.path / first["files"][0]).tobytes() != pictures[0]


def test_the_weak_version_is_an_earlier_step_of_the_same_model(make_config, accelerator, train):
    history = {}
    _, run = train(spy(history), steps=5, weak_fraction=0.6)
    model = make_config().load_trained(run.adapter / "weak", accelerator)
    loaded = {name: value for name, value in model.denoiser.named_parameters() if "lora_" in name}
    assert same(loaded, {name.removeprefix("unet."): value for name, value in history[3].items()})


def test_the_weak_version_of_an_average_is_the_average_of_the_steps_until_then(make_config, accelerator, train):
    history = {}
    _, run = train(spy(history), weak_fraction=0.5, **AVERAGED["ema"])
    oracle = EMAModel([value.clone() for value in history[0].values()], decay=0.9)
    for step in range(1, 4):
        oracle.step([value.requires_grad_() for value in history[step].values()])
    model = make_config().load_trained(run.adapter / "weak", accelerator)
    loaded = [value for name, value in model.denoiser.named_parameters() if "lora_" in name]
    for value, expected in zip(loaded, oracle.shadow_params, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_a_run_killed_before_its_next_checkpoint_exports_the_same_weak_version_again(train, tmp_path):
    file = "weak/pytorch_lora_weights.safetensors"
    _, run = train(weak_fraction=0.5)
    killed = RunDir(tmp_path / "killed")
    with pytest.raises(InterruptionError):
        train(lambda method: interrupt(method, 3), killed, weak_fraction=0.5)
    (killed.adapter / file).unlink()
    train(run=killed, weak_fraction=0.5)
    assert same(load_file(killed.adapter / file), load_file(run.adapter / file))


def gradients(method):
    for parameter in method.backbone.denoiser.parameters():
        parameter.grad = None
    values = method.losses(FOUR)
    values.sum().backward()
    trained = (item for one in method.trained().values() for item in one.parameters().items())
    return values.detach(), [parameter.grad.clone() for _, parameter in trained]


def test_gradient_checkpointing_computes_the_same_twice(make_config, accelerator, train):
    from trainers.efficiency import checkpoint_activations

    method = make_config(text_encoder_lora={"rank": 2}, caption_dropout=0.0).build(0, None, accelerator)
    for one in method.trained().values():
        one.network.train()
    calls = []
    for network in method.backbone.networks.values():
        linear = next(m for name, m in network.named_modules() if name.endswith(("to_q", "q_proj")))
        linear.register_forward_hook(lambda *_: calls.append(1))
    values, grads = gradients(method)
    assert len(calls) == 3
    checkpoint_activations(method)
    calls.clear()
    for parameter in (p for one in method.trained().values() for p in one.parameters().values()):
        parameter.grad = None
    again, grads_again = gradients(method)
    assert len(calls) == 6
    torch.testing.assert_close(again, values, atol=1e-6, rtol=1e-6)
    for a, b in zip(grads, grads_again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about what it does itself
def test_compiled_blocks_train_the_same_adapter(train, monkeypatch):
    compile_module = torch.nn.Module.compile
    # The graphs are the compiler's; that its code is right, too, one block says below: all take minutes.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager"))
    plain, _ = train(steps=2)
    compiled, _ = train(steps=2, compile_blocks=True)
    blocks = [m for m in compiled.backbone.denoiser.modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert blocks
    assert all(block._compiled_call_impl is not None for block in blocks)
    expected = weights(plain)
    for name, value in weights(compiled).items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-3)


def test_attention_is_computed_by_the_chosen_kernel(train):
    allowed = []

    def prepare(method):
        method_losses = method.losses

        def noting(batch):
            allowed.append((torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()))
            return method_losses(batch)

        method.losses = noting

    expected = weights(train()[0])
    for name, value in weights(train(prepare, attention="math")[0]).items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-3)
    assert set(allowed) == {(True, False)}
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_kernel_that_cannot_serve_is_refused_before_the_first_step(train, tmp_path):
    run = RunDir(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"train\.attention: cudnn cannot compute .* on cpu"):
        train(run=run, attention="cudnn")
    assert not run.events.exists()


def test_the_logged_rate_is_the_one_in_effect(train):
    _, run = train(optimizer={"kind": "prodigy", "d0": 1e-4}, schedule={"kind": "constant", "warmup_steps": 3})
    assert [event["lr"] for event in events(run, "train")] == [pytest.approx(1e-4 * factor) for factor in (1 / 3, 1, 1)]
