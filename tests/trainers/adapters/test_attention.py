import logging

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

from trainers.adapters.attention import (
    STRENGTHS,
    TOKENS,
    AttentionStreams,
    CrossAttention,
    cross_attention_processors,
)
from trainers.errors import ConfigError, ModelError
from trainers.streams import AdaptersConfig, cross_attention

WIDTH, TEXT, LENGTHS = 48, 32, {"image": 4, "label": 3}
MID = "mid_block.attentions.0.transformer_blocks.0.attn2.processor"


@pytest.fixture
def unet(sdxl_folder):
    return UNet2DConditionModel.from_pretrained(sdxl_folder / "unet").eval().requires_grad_(False)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def install(unet, lengths=LENGTHS, shake=True, **options):
    config = AdaptersConfig(**options)
    streams = AttentionStreams(unet, config.layouts(cross_attention_processors(unet), lengths), lengths)
    if shake:
        for i, parameter in enumerate(streams.parameters()):
            parameter.data = normal(*parameter.shape, seed=i) * 0.3
    streams.install(unet)
    return streams


def predict(unet, tokens=None, strengths=None, rows=2):
    extra = {TOKENS: tokens, STRENGTHS: strengths}
    added = {"text_embeds": normal(rows, 32, seed=3), "time_ids": torch.full((rows, 6), 64.0)}
    return unet(
        normal(rows, 12, 8, 8, seed=1),
        torch.tensor([7, 700])[:rows],
        normal(rows, TEXT, WIDTH, seed=2),
        added_cond_kwargs=added,
        cross_attention_kwargs={name: value for name, value in extra.items() if value is not None} or None,
    ).sample


def attention(unet, name=MID):
    return unet.get_submodule(name.removesuffix(".processor"))


def call(attn, tokens=None, **options):
    """One layer's answer to fixed pixels and text."""
    x, text = normal(2, 16, 32, seed=4), normal(2, TEXT, WIDTH, seed=5)
    return attn(x, encoder_hidden_states=text, **({} if tokens is None else {TOKENS: tokens}), **options)


def tokens(*, seed=9, rows=2, count=7):
    return normal(rows, count, WIDTH, seed=seed)


def test_a_plain_call_is_the_stock_processors_bit_for_bit(unet):
    expected = predict(unet)
    install(unet)
    assert torch.equal(predict(unet), expected)


def test_zero_tokens_add_nothing_bit_for_bit(unet):
    expected = predict(unet)
    install(unet)
    assert torch.equal(predict(unet, torch.zeros(2, 7, WIDTH)), expected)
    assert not torch.allclose(predict(unet, tokens()), expected, atol=1e-3)


def test_zero_values_add_nothing_bit_for_bit(unet):
    expected = predict(unet)
    install(unet, shake=False).zero_values()
    assert torch.equal(predict(unet, tokens()), expected)


def test_rows_without_tokens_stay_the_base_among_rows_with_them(unet):
    expected = predict(unet)
    install(unet)
    mixed = tokens()
    mixed[1] = 0
    found = predict(unet, mixed)
    assert torch.equal(found[1], expected[1])
    assert not torch.allclose(found[0], expected[0], atol=1e-3)


@pytest.mark.parametrize("stream", ["image", "label"])
def test_a_layers_answer_is_affine_in_each_scale(unet, stream):
    answers = []
    for scale in (0.25, 0.5, 1.0):
        install(unet, **{f"{stream}_scale": scale})
        answers.append(call(attention(unet), tokens()))
    quarter, half, whole = answers
    torch.testing.assert_close(half - quarter, (whole - half) / 2, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(half, whole, atol=1e-3)


def test_strengths_scale_all_streams_row_by_row(unet):
    install(unet)
    attn, extra = attention(unet), tokens()
    none, whole = call(attn, torch.zeros_like(extra)), call(attn, extra)
    found = call(attn, extra, **{STRENGTHS: torch.tensor([0.5, 0.0])})
    torch.testing.assert_close(found[0], (none[0] + whole[0]) / 2, atol=1e-5, rtol=1e-4)
    assert torch.equal(found[1], none[1])


def test_text_shown_as_extra_tokens_is_heard_as_text_before_training(unet):
    text = normal(2, TEXT, WIDTH, seed=5)
    attn = attention(unet)
    once = call(attn) - attn.to_out[0].bias
    install(unet, lengths={"label": TEXT}, shake=False)
    torch.testing.assert_close(call(attn, text) - attn.to_out[0].bias, 2 * once, atol=1e-5, rtol=1e-4)


def test_two_streams_equal_two_of_diffusers_own_adapters(unet):
    streams = install(unet, image_scale=0.7, label_scale=0.4)
    attn, extra = attention(unet), tokens()
    found = call(attn, extra)
    stock = IPAdapterAttnProcessor2_0(32, WIDTH, num_tokens=(4, 3), scale=[0.7, 0.4])
    for i, stream in enumerate(("image", "label")):
        ours = streams.layer(MID).key_value(stream)
        stock.to_k_ip[i].load_state_dict(ours.to_k.state_dict())
        stock.to_v_ip[i].load_state_dict(ours.to_v.state_dict())
    text = (normal(2, TEXT, WIDTH, seed=5), [extra[:, :4], extra[:, 4:]])
    expected = stock(attn, normal(2, 16, 32, seed=4), encoder_hidden_states=text)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_texts_mask_hides_text_and_no_extra_tokens(unet):
    install(unet)
    attn, extra = attention(unet), tokens()
    x, text = normal(2, 16, 32, seed=4), normal(2, TEXT, WIDTH, seed=5)
    bias = torch.zeros(2, 1, TEXT)
    bias[:, :, 10:] = -10000.0
    found = attn(x, encoder_hidden_states=text, attention_mask=bias, **{TOKENS: extra})
    expected = attn(x, encoder_hidden_states=text[:, :10], **{TOKENS: extra})
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_shared_keys_and_values_treat_both_streams_alike(unet):
    streams = install(unet, lengths={"image": 4, "label": 4}, share_ip_kv=True)
    first, second = tokens(count=4), tokens(count=4, seed=10)
    attn = attention(unet)
    swapped = call(attn, torch.cat([second, first], 1))
    torch.testing.assert_close(call(attn, torch.cat([first, second], 1)), swapped, atol=1e-6, rtol=1e-5)
    shared, own = (sum(p.numel() for p in s.parameters()) for s in (streams, install(unet)))
    assert shared * 2 == own


def test_shared_keys_and_values_are_saved_once(unet):
    streams = install(unet, share_ip_kv=True)
    assert streams.owned("label") == {}
    pointers = [value.data_ptr() for value in streams.state_dict().values()]
    assert len(set(pointers)) == len(pointers) == 2 * len(streams.owned("image")) == 2 * len(streams.names)


@pytest.mark.parametrize("count", [6, 8])
def test_a_wrong_number_of_tokens_is_an_error_and_never_taken_from_the_text(unet, count):
    install(unet)
    with pytest.raises(ValueError, match=rf"has {count} tokens; expected 7"):
        predict(unet, tokens(count=count))


def test_self_attention_stays_stock_and_does_not_complain(unet, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    install(unet)
    predict(unet, tokens(), torch.ones(2))
    assert "not expected" not in caplog.text
    kinds = {name: type(processor) for name, processor in unet.attn_processors.items()}
    assert {kind for name, kind in kinds.items() if "attn1" in name} == {AttnProcessor2_0}
    assert {kind for name, kind in kinds.items() if "attn2" in name} == {CrossAttention}


def test_the_unets_own_weights_keep_their_names(unet):
    before = set(unet.state_dict())
    install(unet)
    assert set(unet.state_dict()) == before


def test_another_processor_is_not_replaced(unet):
    attention(unet).set_processor(IPAdapterAttnProcessor2_0(32, WIDTH))
    with pytest.raises(ModelError, match="IPAdapterAttnProcessor2_0; expected diffusers' AttnProcessor2_0"):
        install(unet)


def test_gradient_checkpointing_changes_no_gradient(unet):
    streams, extra = install(unet), tokens().requires_grad_()
    gradients = []
    for enable in (unet.disable_gradient_checkpointing, unet.enable_gradient_checkpointing):
        enable()
        unet.train()
        gradients.append(torch.autograd.grad(predict(unet, extra).square().sum(), [extra, *streams.parameters()]))
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    torch.testing.assert_close(*gradients)


def test_a_rule_for_the_middle_changes_no_other_layer(unet):
    rule = {"match": "mid_block.*", "image_scale": 0.25, "label_scale": 0}
    streams = install(unet, layers=(rule,))
    layouts = {name: streams.layer(name).layout for name in streams.names}
    assert [(name, layout.image, layout.label) for name, layout in layouts.items() if layout.image != 1] == [
        (MID, 0.25, 0)
    ]
    assert "label" not in streams.layer(MID).own


def test_a_layer_without_streams_keeps_the_stock_processor(unet):
    streams = install(unet, layers=({"match": MID, "image_scale": 0, "label_scale": 0},))
    assert MID not in streams.names
    assert isinstance(attention(unet).processor, AttnProcessor2_0)
    predict(unet, tokens())


def test_the_last_rule_that_says_something_decides():
    rules = ({"match": "*", "image_scale": 0.5, "share_kv": True}, {"match": "mid*", "label_scale": 0.2})
    found = AdaptersConfig(layers=rules).layouts(["mid", "up"], ["image", "label"])
    assert (found["mid"].image, found["mid"].label, found["mid"].shared) == (0.5, 0.2, True)
    assert (found["up"].image, found["up"].label, found["up"].shared) == (0.5, 1.0, True)


@pytest.mark.parametrize(
    ("options", "streams", "message"),
    [
        ({"layers": [{"match": "middle.*", "image_scale": 0}]}, ["image"], "layers.0: match 'middle.*' is no layer's"),
        ({"layers": [{"match": "mid*", "label_scale": 0}]}, ["image"], "no label stream"),
        ({"layers": [{"match": "mid*", "share_kv": True}]}, ["image"], "only one stream"),
        ({"label_scale": 0}, ["image", "label"], "label stream has scale 0 in every layer"),
    ],
)
def test_rules_that_do_nothing_are_errors(options, streams, message):
    with pytest.raises(ConfigError, match=message):
        AdaptersConfig.model_validate(options).layouts(["mid", "up"], streams)


def test_a_rule_without_a_change_is_refused():
    with pytest.raises(ValueError, match="changes nothing"):
        AdaptersConfig.model_validate({"layers": [{"match": "*"}]})


def test_layers_found_from_weight_shapes_are_diffusers_processors(unet):
    shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    found = cross_attention(shapes)
    assert set(found) == set(cross_attention_processors(unet))
    assert found[MID] == (32, WIDTH)
