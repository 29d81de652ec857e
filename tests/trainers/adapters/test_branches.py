"""Branches in a whole UNet, and the masks that they are told."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from trainers.adapters.branched import (
    BranchedCrossAttention,
    BranchedSelfAttention,
    Faces,
    box_mask,
    install,
    tokens_inside,
    unreached,
)
from trainers.branching import BranchConfig

ID, R = 10, 2


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet(seed=0):
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, norm_num_groups=8, in_channels=4,
        out_channels=4, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=(2, 4),
        use_linear_projection=True, transformer_layers_per_block=(1, 1), cross_attention_dim=6,
    ).eval().requires_grad_(False)  # fmt: skip


class TestUnet:
    """Pictures of 6 x 8 cells: nothing has to be square."""

    @pytest.fixture
    def call(self):
        def call(network, told=None, seed=0):
            x, text = tensor(4, 4, 6, 8, seed=seed), tensor(4, 7, 6, seed=seed + 1)
            extra = {} if told is None else {"cross_attention_kwargs": {"faces": told}}
            return network(x, torch.tensor([5, 600, 5, 600]), text, **extra).sample

        return call

    def told(self, box=(1, 1, 4, 5), **changes):
        grid = torch.stack([box_mask(box, (6, 8), (6, 8))] * R)
        return Faces(**{"mask": grid, "reference_mask": grid, "identity": tensor(R, ID), **changes})

    def test_every_layer_gets_a_branch(self):
        network = unet()
        branches = install(network, BranchConfig(), ID, 0)
        names = {name.removesuffix(".processor") for name in network.attn_processors}
        inner = {name.replace(".", "/") for name in names if name.endswith("attn1")}
        assert branches.layers.keys() == inner
        kinds = {name[-5:]: type(network.get_submodule(name).processor) for name in names}
        assert kinds == {"attn1": BranchedSelfAttention, "attn2": BranchedCrossAttention}

    def test_nothing_is_trained_inside_the_unet(self):
        network = unet()
        before = dict(network.named_parameters())
        install(network, BranchConfig(branch_adapters=True), ID, 0)
        assert dict(network.named_parameters()).keys() == before.keys()

    def test_a_plain_call_is_the_stock_unet_to_the_bit(self, call):
        network = unet()
        stock = call(network)
        install(network, BranchConfig(gate=1.0), ID, 0)
        call(network, self.told())
        assert torch.equal(call(network), stock)

    @pytest.mark.parametrize(("gate", "box"), [(0.0, (1, 1, 4, 5)), (1.0, (0, 0, 0, 0))])
    def test_closed_gates_and_empty_masks_are_the_stock_unet_on_all_rows(self, call, gate, box):
        network = unet()
        stock = call(network)
        install(network, BranchConfig(gate=gate), ID, 0)
        assert torch.equal(call(network, self.told(box)), stock)

    def test_an_open_gate_changes_pictures_and_not_references(self, call):
        network = unet()
        stock = call(network)
        install(network, BranchConfig(gate=1.0), ID, 0)
        out = call(network, self.told())
        assert not torch.allclose(out[:2], stock[:2], atol=1e-4)
        torch.testing.assert_close(out[2:], stock[2:])

    @pytest.mark.parametrize("mode", ["both", "ref_only"])
    def test_every_branch_weight_and_all_reached_projections_get_gradients(self, call, mode):
        network = unet()
        config = BranchConfig(gate=0.5, branch_adapters=True, train_branch_mode=mode)
        branches = install(network, config, ID, 0)
        projections = {
            name: parameter
            for name, parameter in network.named_parameters()
            if ".attn" in name and name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
        }
        for parameter in projections.values():
            parameter.requires_grad_()
        call(network, self.told())[:2].square().sum().backward()
        for name, parameter in branches.named_parameters():
            assert parameter.grad.abs().sum() > 0, name
        excused = {f"{name}.weight" for name in unreached(network, config)}
        starved = {name for name, p in projections.items() if p.grad is None or p.grad.abs().sum() == 0}
        assert starved == excused
        assert len(excused) == (mode == "ref_only")

    def test_initial_weights_are_a_function_of_the_seed(self):
        first, again, other = (install(unet(), BranchConfig(), ID, seed).state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)

    def test_without_branched_self_attention_nothing_is_installed(self):
        network = unet()
        before = network.attn_processors
        config = BranchConfig(branched_self=False, branched_cross=False)
        assert len(list(install(network, config, ID, 0).parameters())) == 0
        assert network.attn_processors == before


class TestMasks:
    @pytest.mark.parametrize(
        ("box", "cells"),
        [
            ((0, 0, 64, 64), (0, 0, 8, 8)),
            ((8, 16, 24, 40), (1, 2, 3, 5)),
            ((9, 15, 23, 41), (1, 1, 3, 6)),
            ((16, 16, 22, 22), (2, 2, 3, 3)),
            ((63, 63, 64, 64), (7, 7, 8, 8)),
        ],
    )
    def test_a_box_is_rounded_outward(self, box, cells):
        expected = torch.zeros(1, 8, 8)
        expected[:, cells[1] : cells[3], cells[0] : cells[2]] = 1
        assert torch.equal(box_mask(box, (64, 64), (8, 8)), expected)

    def test_a_face_of_one_cell_is_kept_by_every_layer(self):
        cell = box_mask((40, 24, 48, 32), (64, 64), (8, 8))[None]
        for side in (8, 4, 2, 1):
            assert tokens_inside(cell, side * side).sum() == 1

    def test_layers_of_odd_grids_are_found(self):
        assert tokens_inside(torch.ones(1, 1, 5, 7), 3 * 4).all()

    def test_a_layer_that_is_no_halving_is_an_error(self):
        with pytest.raises(ValueError, match="no halving"):
            tokens_inside(torch.ones(1, 1, 8, 8), 15)
