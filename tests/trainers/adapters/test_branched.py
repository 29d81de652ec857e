import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch.nn.functional import scaled_dot_product_attention

from trainers.adapters.branched import (
    Branch,
    BranchedCrossAttention,
    BranchedSelfAttention,
    Faces,
    box_mask,
    tokens_inside,
)
from trainers.branching import BranchConfig

WIDTH, ID, SIDE, R = 32, 10, 4, 2
TOKENS = SIDE * SIDE


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def attn():
    torch.manual_seed(0)
    return Attention(query_dim=WIDTH, heads=4, dim_head=8).eval().requires_grad_(False)


def branched(attn, **changes):
    """The layer's branched processor with an open gate, unless told otherwise."""
    config = BranchConfig(**{"gate": 1.0, "id_alpha": 0.0, **changes})
    branch = Branch(attn.query_dim, ID, config, last=False)
    branch.reset(torch.Generator().manual_seed(1))
    return BranchedSelfAttention(attn.processor, branch, config)


def mask(*boxes):
    return torch.stack([box_mask(box, (SIDE, SIDE), (SIDE, SIDE)) for box in boxes])


ALL, NOTHING = (0, 0, 4, 4), (0, 0, 0, 0)


def faces(inside=((1, 1, 3, 3), (0, 0, 2, 4)), reference=((0, 0, 2, 2), (1, 2, 4, 4)), **changes):
    return Faces(
        **{"mask": mask(*inside), "reference_mask": mask(*reference), "identity": tensor(R, ID, seed=9), **changes}
    )


def attend(attn, queries, keys):
    """Attention of `queries` to the tokens `keys`, by the layer's own projections: an oracle of a few lines."""
    split = (
        part.view(len(part), -1, attn.heads, WIDTH // attn.heads).transpose(1, 2)
        for part in (attn.to_q(queries), attn.to_k(keys), attn.to_v(keys))
    )
    out = scaled_dot_product_attention(*split).transpose(1, 2).reshape(len(queries), -1, WIDTH)
    return attn.to_out[0](out)


class TestSelfAttention:
    @pytest.fixture
    def hidden(self):
        """One plain row, two pictures, their two references."""
        return tensor(1 + 2 * R, TOKENS, WIDTH)

    def test_without_faces_it_is_the_stock_processor_to_the_bit(self, attn, hidden):
        stock = attn(hidden)
        attn.set_processor(branched(attn))
        assert torch.equal(attn(hidden), stock)

    def test_with_empty_masks_every_row_is_stock(self, attn, hidden):
        out = branched(attn)(attn, hidden, faces=faces((NOTHING,) * R, (NOTHING,) * R))
        assert torch.equal(out, attn(hidden))

    def test_a_closed_gate_is_stock(self, attn, hidden):
        out = branched(attn, gate=0.0, id_alpha=0.5, branch_adapters=True)(attn, hidden, faces=faces())
        assert torch.equal(out, attn(hidden))

    @pytest.mark.parametrize("mixing", [False, True])
    def test_a_face_everywhere_that_is_all_the_pictures_own_is_stock(self, attn, hidden, mixing):
        processor = branched(attn, pose_adapt_ratio=1.0, ca_mixing_for_face=mixing)
        out = processor(attn, hidden, faces=faces((ALL,) * R, (ALL,) * R))
        torch.testing.assert_close(out, attn(hidden))

    def test_a_face_everywhere_attends_to_the_whole_reference(self, attn, hidden):
        out = branched(attn)(attn, hidden, faces=faces((ALL,) * R, (ALL,) * R))
        torch.testing.assert_close(out[1:3], attend(attn, hidden[1:3], hidden[3:]))

    def test_a_face_attends_to_the_references_face_alone(self, attn, hidden):
        told = faces()
        out = branched(attn)(attn, hidden, faces=told)
        stock = attn(hidden)
        for row in range(R):
            inside = tokens_inside(told.mask, TOKENS)[row]
            gathered = hidden[3 + row][tokens_inside(told.reference_mask, TOKENS)[row]][None]
            expected = attend(attn, hidden[1 + row][None], gathered)[0]
            torch.testing.assert_close(out[1 + row][inside], expected[inside])
            torch.testing.assert_close(out[1 + row][~inside], stock[1 + row][~inside])

    def test_with_mixing_the_face_attends_to_itself_too(self, attn, hidden):
        told = faces()
        out = branched(attn, ca_mixing_for_face=True)(attn, hidden, faces=told)
        inside, reference = (tokens_inside(part, TOKENS)[0] for part in (told.mask, told.reference_mask))
        keys = torch.cat([hidden[3][reference], hidden[1][inside]])[None]
        torch.testing.assert_close(out[1][inside], attend(attn, hidden[1:2], keys)[0][inside])

    def test_tokens_outside_the_references_face_and_their_number_do_not_matter(self, attn, hidden):
        told = faces(((1, 1, 3, 3),), ((0, 0, 2, 2),), identity=tensor(1, ID))
        processor = branched(attn)
        picture, reference = hidden[1:2], hidden[3:4]
        out = processor(attn, torch.cat([picture, reference]), faces=told)[0]
        elsewhere = ~tokens_inside(told.reference_mask, TOKENS)[0]
        changed = reference.clone()
        changed[:, elsewhere] += 5
        inside = tokens_inside(told.mask, TOKENS)[0]
        assert torch.equal(processor(attn, torch.cat([picture, changed]), faces=told)[0], out)
        torch.testing.assert_close(out[inside], attend(attn, picture, reference[:, ~elsewhere])[0][inside])

    def test_a_token_that_is_a_face_in_one_picture_only_is_mixed_from_that_one(self, attn, hidden):
        told = faces((ALL, ALL), ((0, 0, 2, 4), ALL))
        out = branched(attn, pose_adapt_ratio=0.25)(attn, hidden, faces=told)
        reference = tokens_inside(told.reference_mask, TOKENS)[:, :, None]
        source = torch.where(reference, 0.25 * hidden[1:3] + 0.75 * hidden[3:], hidden[1:3])
        torch.testing.assert_close(out[1:3], attend(attn, hidden[1:3], source))

    def test_the_identity_takes_its_share_of_keys_and_values(self, attn, hidden):
        processor = branched(attn, id_alpha=0.4)
        told = faces((ALL,) * R, (ALL,) * R)
        identity = processor.branch.id_to_hidden(told.identity)[:, None]
        expected = attend(attn, hidden[1:3], 0.6 * hidden[3:] + 0.4 * identity)
        torch.testing.assert_close(processor(attn, hidden, faces=told)[1:3], expected)

    def test_with_alpha_zero_there_is_no_projection_and_no_identity_matters(self, attn, hidden):
        processor = branched(attn)
        assert processor.branch.id_to_hidden is None
        out = processor(attn, hidden, faces=faces())
        assert torch.equal(processor(attn, hidden, faces=faces(identity=tensor(R, ID, seed=77))), out)

    def test_without_a_projection_the_face_is_scaled(self, attn, hidden):
        processor = branched(attn, id_alpha=0.4)
        torch.nn.init.zeros_(processor.branch.id_to_hidden.weight)
        out = processor(attn, hidden, faces=faces((ALL,) * R, (ALL,) * R))
        torch.testing.assert_close(out[1:3], attend(attn, hidden[1:3], 0.6 * hidden[3:]))

    def test_adapters_add_a_linear_map_to_the_face_and_to_the_reference(self, attn, hidden):
        processor = branched(attn, branch_adapters=True)
        told = faces((ALL,) * R, (ALL,) * R)
        plain = branched(attn)(attn, hidden, faces=told)
        assert torch.equal(processor(attn, hidden, faces=told), plain)
        face, reference = processor.branch.face_adapter, processor.branch.ref_adapter
        torch.nn.init.eye_(face.weight)
        torch.testing.assert_close(processor(attn, hidden, faces=told)[1:3], attend(attn, hidden[1:3], 2 * hidden[3:]))
        torch.nn.init.eye_(reference.weight)
        bias = attn.to_out[0].bias
        torch.testing.assert_close(processor(attn, hidden, faces=told)[3:] - bias, 2 * (plain[3:] - bias))

    def test_the_last_layer_has_no_adapter_that_nobody_would_see(self):
        config = BranchConfig(branch_adapters=True)
        assert Branch(WIDTH, ID, config, last=True).ref_adapter is None
        assert Branch(WIDTH, ID, config, last=True).face_adapter is not None

    def test_the_output_is_affine_in_the_scale(self, attn, hidden):
        processor = branched(attn)
        none, half, whole = (processor(attn, hidden, faces=faces(scale=scale)) for scale in (0.0, 0.5, 1.0))
        assert torch.equal(none, attn(hidden))
        torch.testing.assert_close(half, (none + whole) / 2)

    def test_references_and_plain_rows_see_neither_pictures_nor_masks(self, attn, hidden):
        processor = branched(attn, pose_adapt_ratio=0.3, id_alpha=0.3, ca_mixing_for_face=True)
        out = processor(attn, hidden, faces=faces())
        changed = hidden.clone()
        changed[1:3] += 1
        other = processor(attn, changed, faces=faces((ALL, ALL), (ALL, ALL), identity=tensor(R, ID, seed=5)))
        assert torch.equal(other[3:], out[3:])
        assert torch.equal(other[:1], out[:1])

    def test_outside_the_face_the_reference_does_not_matter(self, attn, hidden):
        processor, told = branched(attn), faces()
        changed = hidden.clone()
        changed[3:] += 1
        outside = ~tokens_inside(told.mask, TOKENS)
        before, after = (processor(attn, rows, faces=told)[1:3][outside] for rows in (hidden, changed))
        assert torch.equal(before, after)

    def test_rows_do_not_see_one_another(self, attn, hidden):
        processor = branched(attn, pose_adapt_ratio=0.3, id_alpha=0.3, ca_mixing_for_face=True)
        told = faces()
        both = processor(attn, hidden, faces=told)
        for row in range(R):
            alone = Faces(told.mask[row : row + 1], told.reference_mask[row : row + 1], told.identity[row : row + 1])
            out = processor(attn, hidden[[1 + row, 3 + row]], faces=alone)
            torch.testing.assert_close(out, both[[1 + row, 3 + row]])

    def test_permuted_rows_give_permuted_answers(self, attn, hidden):
        processor, told = branched(attn, id_alpha=0.3), faces()
        swapped = Faces(told.mask.flip(0), told.reference_mask.flip(0), told.identity.flip(0))
        out = processor(attn, hidden[[0, 2, 1, 4, 3]], faces=swapped)
        torch.testing.assert_close(out, processor(attn, hidden, faces=told)[[0, 2, 1, 4, 3]])

    def test_nothing_is_remembered_from_call_to_call(self, attn, hidden):
        processor = branched(attn, id_alpha=0.3)
        first = processor(attn, hidden, faces=faces())
        processor(attn, hidden, faces=faces((ALL, ALL), (ALL, ALL)))
        assert torch.equal(processor(attn, hidden), attn(hidden))
        assert torch.equal(processor(attn, hidden, faces=faces()), first)

    def test_what_the_caller_gave_is_not_changed(self, attn, hidden):
        told, before = faces(), hidden.clone()
        branched(attn, pose_adapt_ratio=0.3, id_alpha=0.3, branch_adapters=True)(attn, hidden, faces=told)
        assert torch.equal(hidden, before)
        assert torch.equal(told.mask, faces().mask)
        assert torch.equal(told.identity, faces().identity)

    @pytest.mark.parametrize(("mode", "learns"), [("both", True), ("ref_only", False)])
    def test_with_ref_only_queries_learn_nothing_from_the_picture(self, attn, hidden, mode, learns):
        attn.to_q.weight.requires_grad_()
        processor = branched(attn, train_branch_mode=mode, pose_adapt_ratio=0.3, ca_mixing_for_face=True)
        processor(attn, hidden, faces=faces())[1:3].square().sum().backward()
        gradient = attn.to_q.weight.grad
        assert (gradient is not None and bool(gradient.abs().sum() > 0)) is learns

    def test_with_ref_only_gradients_reach_the_reference_and_not_the_picture(self, attn, hidden):
        processor = branched(
            attn, train_branch_mode="ref_only", pose_adapt_ratio=0.3, ca_mixing_for_face=True, id_alpha=0.3
        )
        hidden.requires_grad_()
        processor(attn, hidden, faces=faces())[1:3].square().sum().backward()
        assert hidden.grad[1:3].abs().sum() == 0
        assert hidden.grad[3:].abs().sum() > 0
        assert processor.branch.id_to_hidden.weight.grad.abs().sum() > 0
        assert processor.branch.gate.grad.abs().sum() > 0

    def test_a_closed_gate_has_a_gradient(self, attn, hidden):
        processor = branched(attn, gate=0.0)
        processor(attn, hidden, faces=faces())[1:3].square().sum().backward()
        assert (processor.branch.gate.grad != 0).all()


class TestCrossAttention:
    @pytest.fixture
    def attn(self):
        torch.manual_seed(0)
        return Attention(query_dim=WIDTH, cross_attention_dim=6, heads=4, dim_head=8).eval()

    def test_without_a_mask_it_is_the_stock_processor_to_the_bit(self, attn):
        hidden, text = tensor(4, TOKENS, WIDTH), tensor(4, 7, 6)
        stock = attn(hidden, encoder_hidden_states=text)
        attn.set_processor(BranchedCrossAttention(attn.processor))
        assert torch.equal(attn(hidden, encoder_hidden_states=text), stock)
        assert torch.equal(attn(hidden, encoder_hidden_states=text, faces=faces()), stock)

    def test_masked_tokens_do_not_matter_nor_does_their_number(self, attn):
        hidden, text = tensor(4, TOKENS, WIDTH), tensor(4, 7, 6)
        kept = torch.tensor([[True] * 7, [True] * 7, [False] * 3 + [True] * 4, [False] * 3 + [True] * 4])
        processor = BranchedCrossAttention(attn.processor)
        out = processor(attn, hidden, text, faces=faces(text_mask=kept))
        torch.testing.assert_close(out[:2], attn(hidden[:2], encoder_hidden_states=text[:2]))
        torch.testing.assert_close(out[2:], attn(hidden[2:], encoder_hidden_states=text[2:, 3:]))
