import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainers.adapters.tokens import TokenConditioner, read_embedding, stack
from trainers.errors import DataError
from trainers.streams import EmbedToToken, LabelToToken


def build(config, seed=0):
    return TokenConditioner(config, 16, torch.Generator().manual_seed(seed))


def test_a_vector_becomes_tokens_of_the_texts_width():
    conditioner = build(LabelToToken(in_features=5, num_tokens=3))
    assert conditioner(torch.randn(2, 5), torch.tensor([True, True])).shape == (2, 3, 16)


def test_one_linear_map_is_affine():
    conditioner = build(LabelToToken(in_features=5))
    conditioner.proj[0].bias.data.normal_()
    x, present = torch.randn(2, 5), torch.tensor([True, True])
    b, fx = conditioner(torch.zeros(2, 5), present), conditioner(x, present)
    torch.testing.assert_close(conditioner(3 * x, present), 3 * fx + (1 - 3) * b)


@pytest.mark.parametrize("hidden", [None, 10])
def test_without_bias_no_picture_is_no_token(hidden):
    conditioner = build(EmbedToToken(in_features=5, hidden=hidden))
    assert torch.equal(conditioner(torch.zeros(2, 5), torch.tensor([True, True])), torch.zeros(2, 4, 16))


def test_rows_without_a_vector_get_zero_tokens_and_keep_all_weights_in_the_graph():
    conditioner = build(LabelToToken(in_features=5, hidden=7, layer_norm=True))
    found = conditioner(torch.randn(2, 5), torch.tensor([True, False]))
    assert (found[0] != 0).any()
    assert (found[1] == 0).all()
    nothing = conditioner(torch.randn(2, 5), torch.tensor([False, False]))
    assert all(gradient is not None for gradient in torch.autograd.grad(nothing.sum(), list(conditioner.parameters())))


@pytest.mark.parametrize(
    "config", [LabelToToken(in_features=5), EmbedToToken(in_features=5), EmbedToToken(in_features=5, hidden=8)]
)
def test_zeroed_tokens_are_zero_and_can_be_learned(config):
    conditioner = build(config)
    conditioner.zero_tokens()
    out = conditioner(torch.randn(2, 5), torch.tensor([True, True]))
    assert torch.equal(out, torch.zeros_like(out))
    target = torch.randn(out.shape)
    gradients = torch.autograd.grad(((out - target) ** 2).sum(), list(conditioner.parameters()), allow_unused=True)
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_norm_gives_every_token_unit_spread():
    conditioner = build(EmbedToToken(in_features=5))
    found = conditioner(torch.randn(2, 5), torch.tensor([True, True]))
    torch.testing.assert_close(found.std(-1, correction=0), torch.ones(2, 4), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        LabelToToken(in_features=5),
        LabelToToken(in_features=5, hidden=9, layer_norm=True),
        EmbedToToken(in_features=5, hidden=10),
    ],
)
def test_the_announced_number_of_weights_is_right(config):
    found = sum(parameter.numel() for parameter in build(config).parameters())
    assert config.num_weights(16) == found


def test_initial_weights_are_a_function_of_the_generator():
    config = LabelToToken(in_features=5)
    first, again, other = (build(config, seed).proj[0].weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("shape", [(6,), (1, 6)])
def test_an_embedding_is_read_from_either_kind_of_file(tmp_path, shape):
    value = np.arange(6, dtype=np.float16).reshape(shape)
    np.save(tmp_path / "a.npy", value)
    save_file({"embedding": torch.from_numpy(value)}, tmp_path / "a.safetensors")
    for name in ("a.npy", "a.safetensors"):
        found = read_embedding(tmp_path / name, "here", 6)
        assert torch.equal(found, torch.arange(6.0))
        assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((2, 3), np.float32), r"shape \(2, 3\)"),
        (np.array([1.0, np.nan]), "undefined"),
        (np.zeros(3, np.float32), r"has 3 numbers; expected 2"),
        (np.array(["a"]), "cannot be read"),
        (np.array([{}], dtype=object), "cannot be read"),
        (np.array([1j, 2j]), "vector of 2 real numbers"),
    ],
)
def test_what_is_not_an_embedding_is_refused(tmp_path, content, message):
    np.save(tmp_path / "a.npy", content, allow_pickle=True)
    with pytest.raises(DataError, match=f"^row 3: .*{message}"):
        read_embedding(tmp_path / "a.npy", "row 3", 2)


def test_two_tensors_in_one_file_are_refused(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="has 2 tensors"):
        read_embedding(tmp_path / "a.safetensors", "row 3", 2)


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
def test_rubbish_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"rubbish")
    with pytest.raises(DataError, match="cannot be read"):
        read_embedding(tmp_path / name, "row 3", 2)


def test_missing_vectors_stack_as_zeros():
    rows, present = stack([(1.0, 2.0), None, torch.tensor([3.0, 4.0])], 2)
    assert rows.tolist() == [[1, 2], [0, 0], [3, 4]]
    assert present.tolist() == [True, False, True]
