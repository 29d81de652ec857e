import json

import pytest
import torch
from PIL import Image

from tests.contracts.method import MethodContract, weights
from tests.trainers.conftest import build_sdxl
from tests.trainers.data.test_identity import ENTRY, FACE, build_people, write
from trainers.adapters.photomaker import Checkpoint, IdEncoder, IdSizes, write_checkpoint
from trainers.batch import Batch
from trainers.errors import ConfigError, DataError, ModelError
from trainers.faces.miniature import build_network, save_network
from trainers.loop import fit
from trainers.prompt import Prompt
from trainers.rundir import RunDir

FOUR = Batch(0, (0, 1, 2, 3), (0, 1, 2, 3))
WIDTH = 16 + 32
SIZES = IdSizes(
    hidden=8, mlp=12, layers=1, patch=8, image=16, projections=(5, 7), face=6, face_hidden=10, width=WIDTH, tokens=2,
    depth=1, inner=16, feedforward=20,
)  # fmt: skip
EVERYTHING = {
    "branch_adapters": True,
    "pose_adapt_ratio": 0.3,
    "ca_mixing_for_face": True,
    "face_embed_strategy": "id_embeds",
}


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random PhotoMaker for the random base, its own LoRA included."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("photomaker") / "photomaker-v2.safetensors"
    place = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    lora = {f"{place}.lora_A.weight": tensor(2, WIDTH), f"{place}.lora_B.weight": tensor(32, 2, seed=1)}
    write_checkpoint(path, Checkpoint(IdEncoder(SIZES).state_dict(), lora))
    return path


@pytest.fixture(scope="session")
def face_folder(tmp_path_factory):
    """A random face embedder that finds a face in every picture."""
    torch.manual_seed(1)
    network = build_network((4, 8), side=16, size=6)
    with torch.no_grad():
        network.answer.weight[6:] = 0
        network.answer.bias[6:] = torch.tensor([1.0, 0.25, 0.25, 0.75, 0.75])
    folder = tmp_path_factory.mktemp("face")
    save_network(folder, network)
    return folder


@pytest.fixture
def people(tmp_path):
    build_people(tmp_path / "people")
    return tmp_path / "people"


@pytest.fixture
def make(make_config, people, checkpoint, face_folder):
    def make(**changes):
        tree = {
            "kind": "photomaker",
            "data": {"kind": "identity", "path": str(people), "resolution": 64},
            "photomaker": str(checkpoint),
            "faces": {"kind": "miniature", "path": str(face_folder)},
        }
        return make_config(**{**tree, **changes})

    return make


class TestDefaults(MethodContract):
    @pytest.fixture
    def config(self, make):
        return make()


class TestEverything(MethodContract):
    @pytest.fixture
    def config(self, make):
        return make(
            branches=EVERYTHING, branch_lr_scale=1.0, train_id_encoder=True, face_share=1.0, condition_dropout=0.3
        )


def shake(method):
    """Give everything that is trained a weight, as if it had been trained."""
    rng = torch.Generator().manual_seed(5)
    for name, trained in method.trained().items():
        if name != "id_encoder":
            for parameter in trained.parameters().values():
                parameter.data.normal_(0, 0.2, generator=rng)


def prompt(people, text="a man img in red", **changes):
    shown = {"image": people / "anna" / "1.png", "box": (20, 10, 50, 44), "image_box": tuple(FACE)}
    return Prompt(text=text, **{**shown, **changes})


def predict(model, prompts, times=(100, 100)):
    x_t = tensor(len(prompts), *model.latent_shape(64, 64), seed=3)
    with torch.no_grad():
        return model.denoise(x_t, torch.tensor(times[: len(prompts)]), model.prepare(prompts, 64, 64))


@pytest.fixture
def method(make, accelerator):
    return make().build(0, None, accelerator)


def test_the_untrained_method_is_photomaker(make, accelerator, people):
    """Against a base with PhotoMaker's LoRA merged, its own attention, and prompts fused one by one."""
    config = make(branches={**EVERYTHING, "face_embed_strategy": "face"})
    method = config.build(0, None, accelerator)
    bare = make(branches={"branched_self": False, "branched_cross": False}).load_trained(None, accelerator)
    prompts = [prompt(people), prompt(people, "a woman img", image=people / "berta" / "2.png")]
    torch.testing.assert_close(predict(method.model, prompts), predict(bare, prompts), atol=1e-5, rtol=0)


def test_photomakers_own_lora_is_part_of_the_base(make, accelerator, sdxl_folder):
    model = make().load_trained(None, accelerator)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    base = make().backbone.load(torch.device("cpu"), torch.float32)
    difference = model.backbone.denoiser.state_dict()[name] - base.denoiser.state_dict()[name]
    torch.testing.assert_close(difference, tensor(32, 2, seed=1) @ tensor(2, WIDTH), atol=1e-5, rtol=1e-4)


def test_words_alone_are_what_the_backbone_makes_of_them(method, people):
    shake(method)
    model = method.model
    texts = [Prompt(text="a man in red"), None]
    together = predict(model, [*texts, prompt(people)], (100, 100, 100))[:2]
    torch.testing.assert_close(predict(model, texts), together)
    backbone = model.backbone
    x_t = tensor(2, *model.latent_shape(64, 64), seed=3)
    with torch.no_grad():
        expected = backbone.denoise(x_t, torch.tensor([100, 100]), backbone.prepare(texts, 64, 64))
    torch.testing.assert_close(predict(model, texts), expected)


def test_trained_branches_look_at_the_reference_and_the_box(method, people):
    shake(method)
    model = method.model
    told = prompt(people)
    first = predict(model, [told])
    assert torch.equal(predict(model, [told]), first)
    for other in (
        prompt(people, image=people / "berta" / "0.png"),
        prompt(people, box=(0, 0, 20, 20)),
        prompt(people, image_box=(0, 0, 20, 20)),
        prompt(people, "a woman img in red"),
    ):
        assert not torch.allclose(predict(model, [other]), first, atol=1e-4)


@pytest.mark.parametrize("strategy", ["face", "id", "id_embeds"])
def test_a_row_does_not_depend_on_its_neighbours(make, accelerator, people, strategy):
    method = make(branches={**EVERYTHING, "face_embed_strategy": strategy}).build(0, None, accelerator)
    shake(method)
    model = method.model
    rows = [prompt(people), None, prompt(people, "a woman img", image=people / "berta" / "2.png", box=(0, 0, 64, 64))]
    x_t = tensor(3, *model.latent_shape(64, 64), seed=3)
    t = torch.tensor([100, 900, 100])
    condition = model.prepare(rows, 64, 64)
    with torch.no_grad():
        whole = model.denoise(x_t, t, condition)
        alone = [model.denoise(x_t[i : i + 1], t[i : i + 1], condition.select([i])) for i in range(3)]
        turned = model.denoise(x_t.flip(0), t.flip(0), condition.select([2, 1, 0])).flip(0)
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(turned, whole, atol=1e-5, rtol=1e-4)


def test_face_strategies_and_switches_all_change_what_is_drawn(make, accelerator, people):
    drawn = {}
    for name, branches in {
        "face": {},
        "words": {"face_prompt": "a smile"},
        "id": {"face_embed_strategy": "id"},
        "id_embeds": {"face_embed_strategy": "id_embeds"},
        "no cross": {"branched_cross": False},
        "no self": {"branched_self": False, "branched_cross": False},
        "pose": {"pose_adapt_ratio": 0.5},
        "mixing": {"ca_mixing_for_face": True},
        "no id": {"id_alpha": 0.0},
        "more id": {"id_alpha": 0.6},
    }.items():
        model = make(branches={"gate": 1.0, **branches}).build(0, None, accelerator).model
        drawn[name] = predict(model, [prompt(people)])
    names = list(drawn)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert not torch.equal(drawn[name], drawn[other]), (name, other)


def test_phases_are_text_then_photomaker_then_branched(make, accelerator, people):
    phases = [{"start": 0, "mode": "text"}, {"start": 0.5, "mode": "photomaker"}, {"start": 0.8, "mode": "branched"}]
    method = make(phases=phases).build(0, None, accelerator)
    shake(method)
    model = method.model
    at = {t: predict(model, [prompt(people)], (t,)) for t in (900, 400, 100)}

    def alone(mode, t):
        always = make(phases=[{"start": 0, "mode": mode}]).build(0, None, accelerator)
        shake(always)
        return predict(always.model, [prompt(people)], (t,))

    assert torch.equal(at[900], alone("text", 900))
    assert torch.equal(at[400], alone("photomaker", 400))
    assert torch.equal(at[100], alone("branched", 100))
    assert not torch.allclose(alone("photomaker", 100), at[100], atol=1e-4)
    plain = predict(model, [Prompt(text="a man in red")], (900,))
    torch.testing.assert_close(at[900], plain)


def test_adapter_scale_nought_is_photomaker(method, people):
    shake(method)
    model, bare = method.model, method.config.load_trained(None, method._accelerator)
    told = [prompt(people)]
    with model.adapter_scale(0.0):
        torch.testing.assert_close(predict(model, told), predict(bare, told), atol=1e-5, rtol=0)
    assert not torch.allclose(predict(model, told), predict(bare, told), atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"branches": EVERYTHING, "train_id_encoder": True}])
def test_what_is_exported_loads_with_equal_predictions(make, accelerator, people, tmp_path, changes):
    config = make(**changes)
    method = config.build(0, None, accelerator)
    fit(method, config.model_copy(update={"steps": 2}), RunDir(tmp_path / "run"), accelerator)
    shake(method)
    method.export(tmp_path / "adapter")
    loaded = config.load_trained(tmp_path / "adapter", accelerator)
    told = [prompt(people), None]
    assert torch.equal(predict(loaded, told), predict(method.model, told))


def test_an_adapter_of_other_branches_is_an_error_that_names_the_weight(make, accelerator, tmp_path):
    make().build(0, None, accelerator).export(tmp_path)
    with pytest.raises(ModelError, match=r"branches\.safetensors: lacks .*adapter"):
        make(branches={"branch_adapters": True}).load_trained(tmp_path, accelerator)
    (tmp_path / "branches.safetensors").unlink()
    with pytest.raises(ModelError, match=r"branches\.safetensors: no such file"):
        make().load_trained(tmp_path, accelerator)


def test_pictures_may_be_drawn_on_another_base(make, accelerator, people, tmp_path):
    other = build_sdxl(tmp_path / "other", seed=7)
    there = {"kind": "sdxl", "path": str(other)}
    method = make(draw_on=there).build(0, None, accelerator)
    shake(method)
    method.export(tmp_path / "adapter")
    expected = make(backbone=there).load_trained(tmp_path / "adapter", accelerator)
    told = [prompt(people)]
    assert torch.equal(predict(method.model, told), predict(expected, told))
    assert not torch.allclose(predict(method.photomaker, told), predict(expected, told), atol=1e-3)


class TestTraining:
    def test_references_are_other_photos_of_the_same_person_and_change(self, method, monkeypatch):
        seen = []
        tokens = method._identities.tokens

        def spy(rows, model):
            seen.append(rows)
            return tokens(rows, model)

        monkeypatch.setattr(type(method._identities), "tokens", lambda self, rows, model: spy(rows, model))
        for step in range(12):
            method.people(Batch(step, (0, 1), (0, 4)), [0, 1])
        for chosen in seen:
            for place, index in ((0, 0), (1, 4)):
                mine, reference = method.examples[index], method.examples[chosen[place]]
                assert reference.identity == mine.identity
                assert reference.path != mine.path
        assert len({tuple(chosen) for chosen in seen}) > 4

    def test_masks_are_the_boxes_of_picture_and_reference(self, method):
        shown = method.people(FOUR, [0, 1, 2, 3])
        left, top, right, bottom = method.examples[0].box
        expected = torch.zeros(8, 8)
        expected[top // 8 : -(-bottom // 8), left // 8 : -(-right // 8)] = 1
        assert torch.equal(shown.mask[0, 0], expected)

    def test_the_reference_is_its_photos_most_likely_latents(self, method, monkeypatch):
        shown = method.people(FOUR, [0])
        candidates = [
            method.backbone.sample_latents(method._images.select([i], torch.device("cpu")), torch.zeros(1, 12, 8, 8))
            for i in method._others[0]
        ]
        assert any(torch.equal(shown.latents, latents) for latents in candidates)

    def test_dropped_rows_are_told_nothing(self, method):
        condition = method.condition(FOUR, [True, False, True, False])
        assert condition.extra["shows"].tolist() == [True, False, True, False]
        null = method.backbone.encode_prompts([None])
        assert torch.equal(condition.text.hidden[1], null.hidden[0])
        assert torch.equal(condition.text.pooled[3], null.pooled[0])
        assert not torch.equal(condition.text.hidden[0], null.hidden[0])

    def test_a_batch_in_which_everything_is_dropped_still_has_gradients_for_all(self, make, accelerator):
        method = make(condition_dropout=1.0, train_id_encoder=True).build(0, None, accelerator)
        losses = method.losses(FOUR)
        losses.sum().backward()
        for name in ("branches", "id_encoder"):
            for key, parameter in method.trained()[name].parameters().items():
                assert parameter.grad is not None, key
                assert parameter.grad.abs().sum() == 0, key

    def test_dropout_is_drawn_for_each_example_at_its_rate(self, make, accelerator):
        method = make(condition_dropout=0.25).build(3, None, accelerator)
        kept = torch.tensor(
            [method._denoising.kept(Batch(step, tuple(range(8)), (0,) * 8), 0.25) for step in range(500)]
        ).float()
        assert kept.mean().item() == pytest.approx(0.75, abs=0.035)  # five standard errors

    def test_the_loss_is_the_sum_of_its_shares(self, make, accelerator):
        losses = {}
        for share in (0.0, 0.3, 1.0):
            method = make(face_share=share, condition_dropout=0.0).build(0, None, accelerator)
            with torch.no_grad():
                losses[share] = method.losses(FOUR)
        torch.testing.assert_close(losses[0.3], 0.7 * losses[0.0] + 0.3 * losses[1.0])

    def test_a_share_of_one_looks_at_no_cell_outside_the_face(self, make, accelerator):
        method = make(face_share=1.0, condition_dropout=0.0).build(0, None, accelerator)
        errors = tensor(4, 12, 8, 8).square().requires_grad_()
        method._mean(errors, FOUR, [True] * 4).sum().backward()
        inside = method.people(FOUR, [0, 1, 2, 3]).mask.expand_as(errors).bool()
        assert (errors.grad[~inside] == 0).all()
        assert (errors.grad[inside] > 0).all()

    def test_a_dropped_row_has_no_face_and_a_box_of_everything_is_the_plain_mean(self, make, accelerator, people):
        write(people, {f"anna/{i}.png": {**ENTRY, "face_crop": [0, 0, 96, 64]} for i in range(3)})
        method = make(face_share=1.0).build(0, None, accelerator)
        errors = tensor(4, 12, 8, 8).square()
        torch.testing.assert_close(method._mean(errors, FOUR, [True] * 4), errors.mean((1, 2, 3)))
        method = make(face_share=1.0).build(0, None, accelerator)
        torch.testing.assert_close(method._mean(errors, FOUR, [False] * 4), errors.mean((1, 2, 3)))

    def test_the_vision_tower_is_never_trained(self, make, accelerator):
        method = make(train_id_encoder=True).build(0, None, accelerator)
        names = method.trained()["id_encoder"].parameters().keys()
        assert {name.split(".")[0] for name in names} == {"qformer_perceiver", "fuse_module"}

    def test_ref_only_trains_all_but_the_last_layers_queries(self, make, accelerator, tmp_path):
        config = make(branches={"train_branch_mode": "ref_only"}, condition_dropout=0.0)
        method = config.build(0, None, accelerator)
        # The first step opens gates, and only then do other layers' references matter.
        fit(method, config.model_copy(update={"steps": 2}), RunDir(tmp_path / "run"), accelerator)
        method.losses(FOUR).sum().backward()
        for name, trained in method.trained().items():
            for key, parameter in trained.parameters().items():
                assert parameter.grad is not None, (name, key)
                assert parameter.grad.abs().sum() > 0, (name, key)

    def test_validation_judges_what_is_held_out_with_references_from_training(
        self, make, accelerator, tmp_path, people
    ):
        data = {"kind": "identity", "path": str(people), "resolution": 64, "holdout": 2}
        config = make(data=data, validation={"every": 3, "draws": 2})
        method = config.build(0, None, accelerator)
        assert len(method.held_out) == 2
        for row in method._others[-2:]:
            assert row
            assert max(row) < len(method.examples)
        run = RunDir(tmp_path / "run")
        fit(method, config, run, accelerator)
        assert [event["step"] for _, event in run.read_events() if event["event"] == "validation"] == [3, 6]


class TestFrozenWork:
    def test_cold_warm_and_no_cache_give_bit_equal_losses(self, make, accelerator, tmp_path):
        config = make()
        none, cold, warm = (config.build(0, cache, accelerator) for cache in (None, tmp_path / "c", tmp_path / "c"))
        with torch.no_grad():
            assert torch.equal(cold.losses(FOUR), none.losses(FOUR))
            assert torch.equal(warm.losses(FOUR), none.losses(FOUR))

    def test_a_warm_cache_finds_no_face_and_reads_no_caption(self, make, accelerator, tmp_path, monkeypatch):
        config = make()
        config.build(0, tmp_path / "cache", accelerator)
        monkeypatch.setattr("trainers.faces.miniature.MiniatureFace.find", None)
        monkeypatch.setattr("trainers.words.Reader.read", None)
        config.build(1, tmp_path / "cache", accelerator)

    def test_a_photo_without_a_face_is_left_out_and_counted(self, make, accelerator, monkeypatch):
        from trainers.faces.miniature import MiniatureFace

        find = MiniatureFace.find
        monkeypatch.setattr(
            MiniatureFace,
            "find",
            lambda self, image, box=None: None if image.getpixel((0, 0))[0] == 10 else find(self, image, box),
        )
        method = make().build(0, None, accelerator)
        assert [path.name for path in method.unreadable] == ["1.png"]
        assert len(method.examples) == 10
        assert {example.path.name for example in method.examples if example.identity == "anna"} == {"0.png", "2.png"}
        with torch.no_grad():
            assert method.losses(FOUR).isfinite().all()

    def test_nobody_with_a_face_is_an_error(self, make, accelerator, monkeypatch):
        monkeypatch.setattr("trainers.faces.miniature.MiniatureFace.find", lambda self, image, box=None: None)
        with pytest.raises(DataError, match="no face found in any of 12"):
            make().build(0, None, accelerator)

    @pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
    def test_embeddings_made_before_need_no_embedder(self, make, accelerator, people, tmp_path, suffix):
        from safetensors.torch import save_file

        names = [f"{who}/{i}.png" for who in ("anna", "berta") for i in range(3)]
        vectors = {name: tensor(6, seed=i) for i, name in enumerate(names)}
        file = tmp_path / f"embeddings{suffix}"
        save_file(vectors, file) if suffix == ".safetensors" else torch.save(vectors, file)
        data = {"kind": "identity", "path": str(people), "resolution": 64, "embeddings": str(file)}
        config = make(faces=None, data=data)
        config.check()
        method = config.build(0, None, accelerator)
        rows = [i for i, example in enumerate(method.examples) if example.path.parent.name == "berta"]
        image = Image.open(people / "berta" / "0.png")
        expected = method.model.identify(image, tuple(FACE), vectors["berta/0.png"])
        torch.testing.assert_close(method._identities.seen["tokens"][rows[0]], expected[0])


class TestPrompts:
    def test_an_embedding_made_before_takes_the_place_of_the_embedder(self, method, people, tmp_path):
        import numpy as np

        shake(method)
        np.save(tmp_path / "one.npy", tensor(6, seed=4).numpy())
        model = method.model
        told = prompt(people, embedding=tmp_path / "one.npy")
        given = predict(model, [told])
        model.faces = None
        assert torch.equal(predict(model, [told]), given)
        with pytest.raises(ConfigError, match=r"train\.faces"):
            predict(model, [prompt(people)])

    def test_without_a_box_the_face_is_looked_for(self, method, people):
        shake(method)
        found = method.model.faces.find(Image.open(people / "anna" / "1.png").convert("RGB"))
        looked = predict(method.model, [prompt(people, image_box=None)])
        image = prompt(people, image_box=found.box)
        assert looked.shape == predict(method.model, [image]).shape
        assert not torch.allclose(looked, predict(method.model, [prompt(people)]), atol=1e-4)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"box": None}, ConfigError, "set box"),
            ({"box": (0, 0, 65, 10)}, ConfigError, "not inside 64 x 64"),
            ({"box": (5, 5, 5, 10)}, ConfigError, "not inside"),
            ({"label": (1.0,)}, ConfigError, r"photo\s+of a person"),
            ({"image": None}, ConfigError, r"photo\s+of a person"),
            ({"image": None, "box": None, "image_box": None}, ConfigError, r"photo\s+of a person"),
            ({"image_box": (0, 0, 97, 10)}, DataError, r"1\.png: the box"),
            ({"text": "a man in red"}, DataError, "0 trigger words"),
            ({"text": "a man img and a woman img"}, DataError, "2 trigger words"),
        ],
    )
    def test_what_cannot_be_drawn_is_an_error(self, method, people, changes, error, message):
        with pytest.raises(error, match=message):
            method.model.prepare([prompt(people, **changes)], 64, 64)

    def test_a_photo_without_a_face_is_an_error_that_names_it(self, method, people, monkeypatch):
        monkeypatch.setattr("trainers.faces.miniature.MiniatureFace.find", lambda self, image, box=None: None)
        with pytest.raises(DataError, match=r"anna/1\.png: no face found"):
            method.model.prepare([prompt(people)], 64, 64)

    def test_pictures_of_other_shapes_can_be_drawn(self, method, people):
        shake(method)
        model = method.model
        condition = model.prepare([prompt(people)], 48, 96)
        x_t = tensor(1, *model.latent_shape(48, 96))
        with torch.no_grad():
            assert model.denoise(x_t, torch.tensor([100]), condition).shape == x_t.shape


class TestChecks:
    def test_a_good_configuration_passes(self, make):
        make().check()

    def test_captions_are_read_before_anything_starts(self, make, people):
        index = json.loads((people / "index.json").read_text())
        index["anna/0.png"]["text"] = "a man"
        write(people, index)
        with pytest.raises(DataError, match=r"index\.json: 'anna/0\.png'"):
            make().check()

    def test_a_missing_checkpoint_names_its_path(self, make, tmp_path):
        with pytest.raises(ModelError, match=r"train\.photomaker"):
            make(photomaker=str(tmp_path / "nothing.bin")).check()

    def test_some_source_of_embeddings_is_needed(self, make):
        with pytest.raises(ConfigError, match=r"train\.faces"):
            make(faces=None).check()

    def test_a_checkpoint_of_another_size_is_an_error(self, make, accelerator, tmp_path):
        from dataclasses import replace

        torch.manual_seed(0)
        write_checkpoint(tmp_path / "p.safetensors", Checkpoint(IdEncoder(replace(SIZES, width=32)).state_dict(), {}))
        with pytest.raises(ModelError, match="32 numbers"):
            make(photomaker=str(tmp_path / "p.safetensors")).build(0, None, accelerator)

    @pytest.mark.parametrize(
        "changes", [{"lora": None}, {"text_encoder_lora": {"rank": 2}}, {"train_text_encoders": True}]
    )
    def test_only_adapters_of_the_unet_are_trained(self, make, changes):
        with pytest.raises(ValueError, match="adapters of the UNet alone"):
            make(**changes)

    def test_the_announced_number_of_trainable_weights_is_never_too_low(self, make, accelerator):
        config = make(branches=EVERYTHING)
        counted = sum(value.numel() for value in weights(config.build(0, None, accelerator)).values())
        assert counted <= config.num_trainable() <= counted * 1.3
