# pyright: basic
import pytest
import torch

from tests.contracts.method import MethodContract
from tests.trainers.conftest import build_sdxl
from tests.trainers.photomakers import (  # noqa: F401, fixtures among them
    EVERYTHING,
    WIDTH,
    checkpoint_fixture,
    face_folder_fixture,
    make_fixture,
    method_fixture,
    people_fixture,
    predict,
    prompt,
    shake,
    tensor,
)
from trainers.errors import ModelError
from trainers.guidance import AutoGuidance
from trainers.prompt import Prompt
from trainers.rundir import RunDir
from trainers.train import train


@pytest.fixture
def prompts(people):
    return [prompt(people), prompt(people, "a woman img", image=people / "berta" / "2.png"), Prompt(text="a"), None]


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


def test_the_untrained_method_is_photomaker(make, accelerator, people):
    """Against a base with PhotoMaker's LoRA merged, its own attention, and prompts fused one by one."""
    config = make(branches={**EVERYTHING, "face_embed_strategy": "face"})
    method = config.build(0, None, accelerator)
    bare = make(branches={"branched_self": False, "branched_cross": False}).load_trained(None, accelerator)
    prompts = [prompt(people), prompt(people, "a woman img", image=people / "berta" / "2.png")]
    torch.testing.assert_close(predict(method.model, prompts), predict(bare, prompts), atol=1e-5, rtol=0)


def test_what_trials_are_compared_with_is_photomaker_wherever_gates_begin(make, accelerator, people):
    started = make(branches={"gate": 1.0}).build(0, None, accelerator).model
    base, bare = (
        make(branches=branches).load_trained(None, accelerator)
        for branches in ({"gate": 1.0}, {"branched_self": False, "branched_cross": False})
    )
    told = [prompt(people)]
    torch.testing.assert_close(predict(base, told), predict(bare, told), atol=1e-5, rtol=0)
    assert not torch.allclose(predict(started, told), predict(bare, told), atol=1e-3)


def test_a_weak_version_is_refused_when_a_study_is_read(make):
    with pytest.raises(ValueError, match=r"guidance\.weak is checkpoint with PhotoMaker"):
        make(weak_fraction=0.5).check_guidance(AutoGuidance())


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


def test_a_base_to_draw_on_is_loaded_for_pictures_alone(make, accelerator, tmp_path, monkeypatch, sdxl_folder):
    config = make(draw_on={"kind": "sdxl", "path": str(sdxl_folder)}, steps=1)
    monkeypatch.setattr(type(config), "load_trained", lambda *_: pytest.fail("a model was loaded"))
    train(config, RunDir(tmp_path / "run"), 0, None, accelerator)
