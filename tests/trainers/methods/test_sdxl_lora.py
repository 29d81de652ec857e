# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportOperatorIssue=false
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open

from tests.contracts.method import MethodContract, weights
from tests.trainers.data.conftest import cache_folder, shards_fixture  # noqa: F401, fixtures
from trainers.batch import Batch, Geometry
from trainers.errors import DataError, ModelError
from trainers.loop import fit
from trainers.rundir import RunDir

TEXT = {"rank": 2, "lr_scale": 0.5}
FOUR = Batch(0, (0, 1, 2, 3), (0, 1, 2, 3))


class TestUnetAlone(MethodContract):
    @pytest.fixture
    def config(self, make_config):
        return make_config()


class TestWithTextEncoders(MethodContract):
    @pytest.fixture
    def config(self, make_config):
        return make_config(text_encoder_lora=TEXT, loss={"weighting": {"kind": "min_snr"}}, caption_dropout=0.3)


class TestWithAdapterDropout(MethodContract):
    @pytest.fixture
    def config(self, make_config):
        return make_config(lora={"rank": 4, "dropout": 0.3})

    def test_micro_batches_do_not_change_the_mathematics(self):
        pytest.skip("masks of dropout layers depend on how a batch is divided, as documented")


class TestRefiner(MethodContract):
    """On shards, whose scores it is told, at the timesteps that are its own."""

    @pytest.fixture
    def config(self, make_config, sdxl_folder, refiner_folder, shards):
        data = {"kind": "shards", "train": f"{shards}/train-{{00000..00001}}.tar", "resolution": 64}
        return make_config(
            backbone={"kind": "sdxl", "path": str(sdxl_folder), "denoiser": str(refiner_folder)},
            data={**data, "validation": f"{shards}/val-00000.tar", "aesthetic": {"maximum": 100}},
            text_encoder_lora=TEXT,
            loss={"timesteps": [0, 199]},
        )

    def test_it_is_told_five_numbers_of_each_picture(self, method):
        """Of 80 x 64 pixels, cut in the middle, with 10 points of 100 more than the one before."""
        told = method.condition(Batch(0, (0, 1, 2), (4, 0, 2))).sizes
        assert told.tolist() == [[64, 80, 0, 8, 4], [64, 80, 0, 8, 0], [64, 80, 0, 8, 2]]


def shake(method):
    """Give every adapter a weight, as if it had been trained."""
    rng = torch.Generator().manual_seed(5)
    for trained in method.trained().values():
        for parameter in trained.parameters().values():
            parameter.data.normal_(0, 0.2, generator=rng)


def predict(unet, condition, x_t):
    with torch.no_grad():
        added = {"text_embeds": condition[1], "time_ids": condition[2]}
        return unet(x_t, torch.tensor([7, 700]), condition[0], added_cond_kwargs=added).sample


def inputs(backbone):
    x_t = torch.randn(2, *backbone.latent_shape(64, 64), generator=torch.Generator().manual_seed(1))
    return x_t, torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)


@pytest.mark.parametrize("text", [None, {**TEXT, "alpha": 6.0}])
def test_the_adapter_loads_in_the_stock_pipeline(make_config, accelerator, tmp_path, sdxl_folder, text):
    method = make_config(lora={"rank": 4, "alpha": 1.5}, text_encoder_lora=text).build(0, None, accelerator)
    shake(method)
    method.export(tmp_path / "adapter")
    backbone = method.backbone
    x_t, time_ids = inputs(backbone)

    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, local_files_only=True)
    base_text = pipeline.encode_prompt(["a", "b"], do_classifier_free_guidance=False)
    base = predict(pipeline.unet, (base_text[0], base_text[2], time_ids), x_t)
    pipeline.load_lora_weights(tmp_path / "adapter", adapter_name="default")

    loaded = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}
    for name, trained in method.trained().items():
        theirs = dict(loaded[name].named_parameters())
        for key, value in trained.parameters().items():
            assert torch.equal(theirs[key], value), key
        assert loaded[name].peft_config["default"].lora_alpha == trained.network.peft_config["default"].lora_alpha

    embedded = pipeline.encode_prompt(["a", "b"], do_classifier_free_guidance=False)
    theirs = predict(pipeline.unet, (embedded[0], embedded[2], time_ids), x_t)
    with torch.no_grad():
        condition = backbone.condition(backbone.encode_prompts(["a", "b"]), [Geometry.whole(64, 64)] * 2)
        ours = backbone.denoise(x_t, torch.tensor([7, 700]), condition)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert not torch.allclose(ours, base, atol=1e-3)

    pipeline.set_adapters(["default"], [0.0])
    nothing = pipeline.encode_prompt(["a", "b"], do_classifier_free_guidance=False)
    assert torch.equal(predict(pipeline.unet, (nothing[0], nothing[2], time_ids), x_t), base)
    with torch.no_grad(), backbone.adapter_scale(0.0):
        condition = backbone.condition(backbone.encode_prompts(["a", "b"]), [Geometry.whole(64, 64)] * 2)
        torch.testing.assert_close(backbone.denoise(x_t, torch.tensor([7, 700]), condition), base, atol=1e-6, rtol=0)


def test_a_folder_without_an_adapter_is_an_error(make_config, accelerator, tmp_path):
    with pytest.raises(ModelError, match="expected the adapter of a finished trial"):
        make_config().load_trained(tmp_path, accelerator)


def test_adapter_scale_is_a_scale_of_the_weights_and_is_undone(make_config, accelerator):
    method = make_config(text_encoder_lora=TEXT).build(0, None, accelerator)
    shake(method)
    backbone = method.backbone
    with torch.no_grad():
        full = backbone.encode_prompts(["a"]).hidden
        with backbone.adapter_scale(0.5):
            half = backbone.encode_prompts(["a"]).hidden
            with backbone.adapter_scale(0.0):
                pass
            assert torch.equal(backbone.encode_prompts(["a"]).hidden, half)
        assert torch.equal(backbone.encode_prompts(["a"]).hidden, full)
        for name, parameter in method.trained()["text_encoder"].parameters().items():
            if "lora_B" in name:
                parameter.mul_(0.5)
        for name, parameter in method.trained()["text_encoder_2"].parameters().items():
            if "lora_B" in name:
                parameter.mul_(0.5)
        torch.testing.assert_close(backbone.encode_prompts(["a"]).hidden, half)


def test_the_untrained_method_is_the_base_model(make_config, accelerator, sdxl_folder):
    config = make_config(text_encoder_lora=TEXT)
    method = config.build(0, None, accelerator)
    base = config.backbone.load(torch.device("cpu"), torch.float32)
    x_t, _ = inputs(base)
    geometries = [Geometry.whole(64, 64)] * 2
    with torch.no_grad():
        predictions = [
            b.denoise(x_t, torch.tensor([7, 700]), b.condition(b.encode_prompts(["a", "b"]), geometries))
            for b in (method.backbone, base)
        ]
    assert torch.equal(*predictions)


def test_alpha_null_follows_rank(make_config, accelerator):
    method = make_config(lora={"rank": 7}).build(0, None, accelerator)
    assert method.backbone.denoiser.peft_config["default"].lora_alpha == 7


def test_the_file_names_no_path_of_this_machine(make_config, accelerator, tmp_path, sdxl_folder):
    method = make_config(text_encoder_lora=TEXT).build(0, None, accelerator)
    method.export(tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert "lora_alpha" in str(file.metadata())
        assert str(sdxl_folder) not in str(file.metadata())


def test_captions_are_dropped_at_their_rate_and_at_changing_places(make_config, accelerator):
    method = make_config(caption_dropout=0.25).build(3, None, accelerator)
    dropped = torch.tensor(
        [[prompt is None for prompt in method.prompts(Batch(step, tuple(range(8)), (0,) * 8))] for step in range(500)]
    ).float()
    # Five standard errors of 4,000, and of 500, independent draws.
    assert dropped.mean().item() == pytest.approx(0.25, abs=0.035)
    assert (dropped.mean(0) - 0.25).abs().max() < 0.1


@pytest.mark.parametrize(("rate", "expected"), [(0.0, False), (1.0, True)])
def test_dropout_of_none_and_of_all(make_config, accelerator, rate, expected):
    method = make_config(caption_dropout=rate).build(0, None, accelerator)
    prompts = {prompt is None for step in range(20) for prompt in method.prompts(Batch(step, (0, 1), (0, 1)))}
    assert prompts == {expected}


def test_a_dropped_caption_is_what_sampling_calls_no_prompt(make_config, accelerator):
    method = make_config(caption_dropout=1.0).build(0, None, accelerator)
    assert torch.equal(method.condition(FOUR).text.hidden[:1], method.backbone.encode_prompts([None]).hidden)


@pytest.mark.parametrize("folder", ["sdxl_folder", "v_prediction_folder"])
def test_without_gamma_the_loss_is_the_plain_mean_square_and_with_it_the_weighted_one(
    make_config, accelerator, request, folder
):
    backbone = {"kind": "sdxl", "path": str(request.getfixturevalue(folder))}
    plain = make_config(backbone=backbone).build(0, None, accelerator)
    loss = {"weighting": {"kind": "min_snr", "gamma": 2.0}}
    weighted = make_config(backbone=backbone, loss=loss).build(0, None, accelerator)
    seen = []
    process = weighted.backbone.process
    denoise = weighted.backbone.denoise

    def spy(x_t, t, condition):
        seen.append(t)
        return denoise(x_t, t, condition)

    weighted.backbone.denoise = spy
    with torch.no_grad():
        losses, plainly = weighted.losses(FOUR), plain.losses(FOUR)
    snr = process.snr(seen[0])
    shift = 1 if process.prediction == "v_prediction" else 0
    torch.testing.assert_close(losses, plainly * snr.clamp(max=2.0) / (snr + shift))


def test_cold_warm_and_no_cache_give_bit_equal_losses(make_config, accelerator, tmp_path):
    config = make_config()
    none, cold, warm = (config.build(0, cache, accelerator) for cache in (None, tmp_path / "c", tmp_path / "c"))
    with torch.no_grad():
        expected = none.losses(FOUR)
        assert torch.equal(cold.losses(FOUR), expected)
        assert torch.equal(warm.losses(FOUR), expected)


def test_a_warm_cache_encodes_nothing(make_config, accelerator, tmp_path, monkeypatch):
    config = make_config()
    config.build(0, tmp_path / "cache", accelerator)
    for name in ("encode_image", "encode_prompts"):
        monkeypatch.setattr(f"trainers.backbones.sdxl.Sdxl.{name}", None)
    monkeypatch.setattr("trainers.data.folder.FolderConfig.read", None)
    config.build(1, tmp_path / "cache", accelerator)


def test_text_is_not_cached_while_the_text_encoders_train(make_config, accelerator, tmp_path):
    make_config(text_encoder_lora=TEXT).build(0, tmp_path / "cache", accelerator)
    images_only = len(list((tmp_path / "cache").rglob("*.safetensors")))
    make_config().build(0, tmp_path / "cache", accelerator)
    assert images_only == 6
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 6 + 6 + 1  # captions, and none


def test_another_models_cache_is_not_used(make_config, accelerator, tmp_path, v_prediction_folder, sdxl_folder):
    other = shutil.copytree(sdxl_folder, tmp_path / "other")
    config = make_config(backbone={"kind": "sdxl", "path": str(other)})
    before = config.build(0, tmp_path / "cache", accelerator)
    weights_of_vae = other / "vae" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    changed = {name: value * 1.5 for name, value in load_file(weights_of_vae).items()}
    save_file(changed, weights_of_vae, {"format": "pt"})
    after = config.build(0, tmp_path / "cache", accelerator)
    plain = config.build(0, None, accelerator)
    with torch.no_grad():
        assert torch.equal(after.losses(FOUR), plain.losses(FOUR))
        assert not torch.allclose(after.losses(FOUR), before.losses(FOUR))


def test_a_damaged_cache_entry_is_made_again(make_config, accelerator, tmp_path):
    config = make_config()
    first = config.build(0, tmp_path / "cache", accelerator)
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:20])
    again = config.build(0, tmp_path / "cache", accelerator)
    with torch.no_grad():
        assert torch.equal(again.losses(FOUR), first.losses(FOUR))


def test_a_picture_that_cannot_be_decoded_is_left_out_and_reported(make_config, accelerator, pictures, tmp_path):
    (pictures / "1.png").write_bytes((pictures / "1.png").read_bytes()[:80])
    for _ in ("cold", "warm"):
        method = make_config().build(0, tmp_path / "cache", accelerator)
        assert [path.name for path in method.unreadable] == ["1.png"]
        assert [example.path.name for example in method.examples] == [f"{i}.png" for i in (0, 2, 3, 4, 5)]


def test_a_strict_folder_stops_at_a_picture_that_cannot_be_decoded(make_config, accelerator, pictures):
    (pictures / "1.png").write_bytes(b"rubbish")
    data = {"kind": "folder", "path": str(pictures), "resolution": 64, "strict": True}
    with pytest.raises(DataError, match=r"1\.png"):
        make_config(data=data).build(0, None, accelerator)


def test_no_readable_picture_at_all_is_an_error(make_config, accelerator, pictures):
    for file in pictures.glob("*.png"):
        file.write_bytes(b"rubbish")
    with pytest.raises(DataError, match="none of the 6"):
        make_config().build(0, None, accelerator)


def test_a_resolution_that_the_autoencoder_cannot_halve_is_refused(make_config, pictures):
    config = make_config(data={"kind": "folder", "path": str(pictures), "resolution": 60})
    with pytest.raises(DataError, match="multiples of 8"):
        config.check()


def test_text_encoders_learn_at_their_own_rate(make_config, accelerator, tmp_path):
    from trainers.checkpoint import load_checkpoint

    config = make_config(text_encoder_lora=TEXT, steps=2)
    run = RunDir(tmp_path / "run")
    fit(config.build(0, None, accelerator), config, run, accelerator)
    state = load_checkpoint(run.checkpoints)
    assert [group["peak"] for group in state["optimizer"]["param_groups"]] == [1e-2, 5e-3, 5e-3]


def test_frozen_weights_may_be_bfloat16_while_adapters_train_in_float32(make_config, tmp_path):
    from accelerate.state import AcceleratorState

    from trainers.train import build_accelerator

    config = make_config(precision="bf16", text_encoder_lora=TEXT)
    try:
        accelerator = build_accelerator(config)
        method = config.build(0, None, accelerator)
        before = weights(method)
        fit(method, config, RunDir(tmp_path / "run"), accelerator)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert method.backbone.denoiser.conv_in.weight.dtype == torch.bfloat16
    assert {value.dtype for value in weights(method).values()} == {torch.float32}
    assert all(not torch.equal(value, before[name]) for name, value in weights(method).items())


def test_the_announced_number_of_trainable_weights_is_never_too_low(make_config, accelerator):
    config = make_config(text_encoder_lora=TEXT)
    counted = sum(value.numel() for value in weights(config.build(0, None, accelerator)).values())
    assert counted <= config.num_trainable() <= counted * 1.3
