import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from trainers.adapters.lora import UNET_TARGETS, LoraConfig, add_lora
from trainers.adapters.queries import attention_layers, call_with_queries, choose_layer
from trainers.errors import ModelError

LAYER = "up_blocks.0.attentions.1.transformer_blocks.0.attn1"


def build_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, norm_num_groups=8, cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
    ).requires_grad_(False).eval()  # fmt: skip


@pytest.fixture
def unet():
    return build_unet()


@pytest.fixture
def adapted(unet):
    add_lora(unet, LoraConfig(rank=2), UNET_TARGETS, 0)
    return unet


INPUTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([7, 700])
TEXT = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))


def run(unet):
    return unet(*INPUTS, TEXT).sample


def with_queries(unet):
    return call_with_queries(unet, LAYER, lambda: run(unet))


def parameters(unet):
    return {name: value for name, value in unet.named_parameters() if value.requires_grad}


def gradients(unet, loss):
    names, values = zip(*parameters(unet).items(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, values, allow_unused=True), strict=True))


def shake(unet):
    rng = torch.Generator().manual_seed(5)
    for value in parameters(unet).values():
        value.data.normal_(0, 0.2, generator=rng)


def test_the_queries_are_what_the_projection_answers(unet):
    seen = []
    projection = unet.get_submodule(f"{LAYER}.to_q")
    projection.forward = lambda x, forward=projection.forward: seen.append(x) or forward(x)
    _, queries = with_queries(unet)
    torch.testing.assert_close(queries, seen[0] @ projection.weight.T)
    assert queries.shape == (2, 16, 32)


def test_reading_changes_nothing(adapted):
    shake(adapted)
    prediction, _ = with_queries(adapted)
    assert torch.equal(prediction, run(adapted))


def test_nothing_is_left_behind(unet):
    with_queries(unet)
    run(unet)
    assert not any(module._forward_hooks for module in unet.modules())


def test_a_failing_pass_leaves_nothing_behind_either(unet):
    def fail():
        raise KeyError("x")

    with pytest.raises(KeyError):
        call_with_queries(unet, LAYER, fail)
    assert not any(module._forward_hooks for module in unet.modules())


def test_gradients_reach_the_layers_own_adapter_and_earlier_ones_and_none_later(adapted):
    shake(adapted)
    found = gradients(adapted, with_queries(adapted)[1].square().sum())
    own = {name: value for name, value in found.items() if name.startswith(f"{LAYER}.to_q.")}
    assert len(own) == 2
    assert all(value.abs().sum() > 0 for value in own.values())
    assert all(value.abs().sum() > 0 for name, value in found.items() if name.startswith(("down_", "mid_")))
    later = (f"{LAYER}.to_k", f"{LAYER}.to_v", f"{LAYER}.to_out", LAYER.replace("attn1", "attn2"))
    rest = [value for name, value in found.items() if name.startswith(later)]
    assert rest == [None] * len(rest)
    assert rest


def test_gradient_checkpointing_records_once_and_gives_the_same_gradients(adapted):
    shake(adapted)
    again = copy.deepcopy(adapted)
    again.enable_gradient_checkpointing()
    again.train()
    results = []
    for unet in (adapted, again):
        prediction, queries = with_queries(unet)
        results.append(gradients(unet, prediction.square().sum() + queries.square().sum()))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)


def test_sampling_between_two_steps_does_not_change_the_second(adapted):
    shake(adapted)
    first = with_queries(adapted)[1]
    with torch.no_grad():
        adapted(torch.randn(4, 4, 8, 8), torch.tensor(3), torch.randn(4, 5, 12))
    again = with_queries(adapted)[1]
    assert torch.equal(again, first)
    assert again.requires_grad


def test_two_passes_are_refused(unet):
    with pytest.raises(ModelError, match="called 2 times"):
        call_with_queries(unet, LAYER, lambda: [run(unet), run(unet)])


def test_no_pass_at_all_is_refused(unet):
    with pytest.raises(ModelError, match="called 0 times"):
        call_with_queries(unet, LAYER, lambda: None)


def names(blocks, attentions, transformers):
    return [
        f"up_blocks.{block}.attentions.{attention}.transformer_blocks.{transformer}.{layer}.{part}.weight"
        for block in blocks
        for attention in range(attentions)
        for transformer in range(transformers)
        for layer in ("attn1", "attn2")
        for part in ("to_q", "to_k")
    ]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (names((1, 2, 3), 3, 1), "up_blocks.3.attentions.2.transformer_blocks.0.attn1"),
        (names((0,), 3, 10) + names((1,), 3, 2), "up_blocks.1.attentions.2.transformer_blocks.1.attn1"),
        (names((0,), 1, 12), "up_blocks.0.attentions.0.transformer_blocks.11.attn1"),
    ],
)
def test_the_default_is_the_last_self_attention_on_the_way_up(weights, expected):
    weights.append("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight")
    assert choose_layer(None, sorted(weights)) == expected


def test_a_layer_can_be_named(unet):
    weights = [name for name, _ in unet.named_parameters()]
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert choose_layer(layer, weights) == layer
    assert choose_layer(None, weights) == LAYER
    assert len(attention_layers(weights)) == 8


def test_an_unknown_layer_is_an_error_that_names_some(unet):
    weights = [name for name, _ in unet.named_parameters()]
    with pytest.raises(ModelError, match=r"'up_blocks.9.attn1' is not .* one of 8, such as up_blocks"):
        choose_layer("up_blocks.9.attn1", weights)


def test_a_denoiser_without_attention_on_its_way_up_needs_a_name():
    with pytest.raises(ModelError, match="name a layer"):
        choose_layer(None, ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"])
