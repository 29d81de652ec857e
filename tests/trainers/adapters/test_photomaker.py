import pytest
import torch
from PIL import Image

from trainers.adapters.photomaker import (
    Checkpoint,
    IdEncoder,
    IdSizes,
    face_pixels,
    fuse_lora,
    identity_features,
    read_checkpoint,
    write_checkpoint,
)
from trainers.errors import ModelError

SMALL = IdSizes(
    hidden=8, mlp=12, layers=2, patch=4, image=16, projections=(5, 7), face=6, face_hidden=10, width=12, tokens=2,
    depth=2, inner=12, feedforward=20,
)  # fmt: skip


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return IdEncoder(SMALL).eval().requires_grad_(False)


def published_shapes():
    """Names and shapes of the published checkpoint's `id_encoder`."""
    tower = {
        "embeddings.class_embedding": (1024,),
        "embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "embeddings.position_embedding.weight": (257, 1024),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        tower |= {f"{norm}.weight": (1024,), f"{norm}.bias": (1024,)}
    for i in range(24):
        layer = f"encoder.layers.{i}"
        for norm in ("layer_norm1", "layer_norm2"):
            tower |= {f"{layer}.{norm}.weight": (1024,), f"{layer}.{norm}.bias": (1024,)}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tower |= {f"{layer}.self_attn.{name}.weight": (1024, 1024), f"{layer}.self_attn.{name}.bias": (1024,)}
        tower |= {f"{layer}.mlp.fc1.weight": (4096, 1024), f"{layer}.mlp.fc1.bias": (4096,)}
        tower |= {f"{layer}.mlp.fc2.weight": (1024, 4096), f"{layer}.mlp.fc2.bias": (1024,)}
    shapes = {f"vision_model.{name}": shape for name, shape in tower.items()}
    shapes |= {"visual_projection.weight": (768, 1024), "visual_projection_2.weight": (1280, 1024)}
    perceiver = {
        "token_proj.0.weight": (2048, 512), "token_proj.0.bias": (2048,),
        "token_proj.2.weight": (4096, 2048), "token_proj.2.bias": (4096,),
        "token_norm.weight": (2048,), "token_norm.bias": (2048,),
    }  # fmt: skip
    resampler = {"proj_in.weight": (2048, 1024), "proj_in.bias": (2048,)}
    resampler |= {"proj_out.weight": (2048, 2048), "proj_out.bias": (2048,)}
    resampler |= {"norm_out.weight": (2048,), "norm_out.bias": (2048,)}
    for i in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            resampler |= {f"layers.{i}.{norm}.weight": (2048,), f"layers.{i}.{norm}.bias": (2048,)}
        resampler |= {f"layers.{i}.0.to_q.weight": (2048, 2048), f"layers.{i}.0.to_kv.weight": (4096, 2048)}
        resampler |= {f"layers.{i}.0.to_out.weight": (2048, 2048)}
        resampler |= {f"layers.{i}.1.1.weight": (8192, 2048), f"layers.{i}.1.3.weight": (2048, 8192)}
    perceiver |= {f"perceiver_resampler.{name}": shape for name, shape in resampler.items()}
    shapes |= {f"qformer_perceiver.{name}": shape for name, shape in perceiver.items()}
    for mlp, width in (("mlp1", 4096), ("mlp2", 2048)):
        fuse = {"layernorm.weight": (width,), "layernorm.bias": (width,), "fc1.weight": (2048, width)}
        fuse |= {"fc1.bias": (2048,), "fc2.weight": (2048, 2048), "fc2.bias": (2048,)}
        shapes |= {f"fuse_module.{mlp}.{name}": shape for name, shape in fuse.items()}
    return shapes | {"fuse_module.layer_norm.weight": (2048,), "fuse_module.layer_norm.bias": (2048,)}


class TestLayout:
    def test_at_full_size_it_is_the_published_checkpoints(self):
        with torch.device("meta"):
            encoder = IdEncoder(IdSizes())
        assert {name: tuple(value.shape) for name, value in encoder.state_dict().items()} == published_shapes()

    def test_sizes_come_from_the_published_shapes(self):
        state = {name: torch.empty(shape, device="meta") for name, shape in published_shapes().items()}
        assert IdSizes.of(state) == IdSizes()
        assert (IdSizes().heads, IdSizes().perceiver_heads) == (16, 16)

    @pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
    def test_a_checkpoint_of_another_size_is_read_back(self, encoder, tmp_path, suffix):
        path = tmp_path / f"photomaker-v2{suffix}"
        checkpoint = Checkpoint(encoder.state_dict(), {"unet.a.lora_A.weight": tensor(2, 3)})
        if suffix == ".bin":
            torch.save({"id_encoder": checkpoint.id_encoder, "lora_weights": checkpoint.lora_weights}, path)
        else:
            write_checkpoint(path, checkpoint)
        found = read_checkpoint(path)
        again = IdEncoder.load(found.id_encoder, path)
        assert again.sizes == SMALL
        assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in again.state_dict().items())
        assert torch.equal(found.lora_weights["unet.a.lora_A.weight"], tensor(2, 3))
        assert not any(parameter.requires_grad for parameter in again.parameters())
        assert not again.training

    def test_the_counting_buffer_of_older_files_is_passed_over(self, encoder, tmp_path):
        state = {**encoder.state_dict(), "vision_model.embeddings.position_ids": torch.arange(17)[None]}
        IdEncoder.load(state, tmp_path)

    def test_a_missing_tensor_is_an_error_that_names_the_file(self, encoder, tmp_path):
        for name in ("fuse_module.layer_norm.bias", "visual_projection.weight"):
            state = {key: value for key, value in encoder.state_dict().items() if key != name}
            with pytest.raises(ModelError, match=f"(?s){tmp_path}.*{name}"):
                IdEncoder.load(state, tmp_path)

    @pytest.mark.parametrize("content", [None, b"rubbish", "state"])
    def test_a_file_that_is_no_checkpoint_is_an_error_that_names_it(self, tmp_path, content):
        path = tmp_path / "photomaker-v2.bin"
        if content == "state":
            torch.save({"id_encoder": {}}, path)
        elif content:
            path.write_bytes(content)
        with pytest.raises(ModelError, match=r"photomaker-v2\.bin"):
            read_checkpoint(path)


class TestTokens:
    def test_each_photo_has_its_own_and_batches_change_nothing(self, encoder):
        pixels, faces = tensor(3, 3, 16, 16), tensor(3, 6, seed=1)
        tokens = encoder.tokens(pixels, faces)
        assert tokens.shape == (3, 2, 12)
        for row in range(3):
            torch.testing.assert_close(tokens[row], encoder.tokens(pixels[row][None], faces[row][None])[0])

    def test_both_the_photo_and_the_face_vector_matter(self, encoder):
        pixels, faces = tensor(1, 3, 16, 16), tensor(1, 6, seed=1)
        tokens = encoder.tokens(pixels, faces)
        assert not torch.allclose(encoder.tokens(pixels + 1, faces), tokens)
        assert not torch.allclose(encoder.tokens(pixels, faces + 1), tokens)

    def test_perceiver_attention_is_scaled_softmax_over_what_is_seen_and_the_queries(self, encoder):
        layer = encoder.qformer_perceiver.perceiver_resampler.layers[0][0]
        queries, seen = tensor(2, 2, 12), tensor(2, 5, 12, seed=1)
        z = layer.norm2(queries)
        q = layer.to_q(z) * 12**-0.25
        k, v = layer.to_kv(torch.cat([layer.norm1(seen), z], 1)).chunk(2, -1)
        expected = layer.to_out(((q @ (k * 12**-0.25).mT).softmax(-1)) @ v)
        torch.testing.assert_close(layer(queries, seen), expected)

    def test_features_are_the_mean_over_tokens_and_photos(self):
        tokens = tensor(3, 4, 12)
        per_photo = tokens.view(3, 2, 2, 12).mean(2).mean(1)
        torch.testing.assert_close(identity_features(tokens), per_photo)


class TestFuse:
    MASK = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)

    def test_marked_places_are_fused_and_all_others_stay(self, encoder):
        hidden, tokens = tensor(3, 5, 12), tensor(3, 2, 12, seed=1)
        before = hidden.clone()
        out = encoder.fuse(hidden, tokens, self.MASK)
        assert torch.equal(hidden, before)
        assert torch.equal(out[~self.MASK], hidden[~self.MASK])
        fuse = encoder.fuse_module
        for row, place, token in ((0, 1, 0), (0, 2, 1), (2, 3, 0), (2, 4, 1)):
            word = hidden[row, place]
            mixed = fuse.mlp1(torch.cat([word, tokens[row, token]])) + word
            torch.testing.assert_close(out[row, place], fuse.layer_norm(fuse.mlp2(mixed) + mixed))

    def test_a_batch_is_a_loop_over_its_rows(self, encoder):
        hidden, tokens = tensor(3, 5, 12), tensor(3, 2, 12, seed=1)
        out = encoder.fuse(hidden, tokens, self.MASK)
        rows = [encoder.fuse(hidden[i][None], tokens[i][None], self.MASK[i][None])[0] for i in range(3)]
        torch.testing.assert_close(out, torch.stack(rows))

    def test_several_photos_stand_in_order(self, encoder):
        hidden, photos = tensor(1, 6, 12), tensor(3, 2, 12, seed=1)
        out = encoder.fuse(hidden, photos.view(1, 6, 12), torch.ones(1, 6, dtype=torch.bool))
        for i in range(6):
            single = torch.zeros(1, 6, dtype=torch.bool)
            single[0, i] = True
            one = encoder.fuse(hidden, photos.view(1, 6, 12)[:, i : i + 1], single)
            torch.testing.assert_close(out[0, i], one[0, i])

    def test_another_number_of_places_is_an_error(self, encoder):
        with pytest.raises(ValueError, match="expected 3"):
            encoder.fuse(tensor(3, 5, 12), tensor(3, 3, 12), self.MASK)


class TestFacePixels:
    def test_the_whole_picture_is_normalised_as_clip_expects(self):
        pixels = face_pixels(Image.new("RGB", (20, 20), (255, 0, 128)), (0, 0, 20, 20), 16)
        expected = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, (128 / 255 - 0.40821073) / 0.27577711]
        assert pixels.shape == (1, 3, 16, 16)
        assert pixels[0, :, 3, 7].tolist() == pytest.approx(expected)

    def test_the_face_is_grown_to_a_square_and_by_a_fifth(self):
        image = Image.new("RGB", (100, 100))
        image.paste((255, 255, 255), (36, 36, 64, 64))  # 20 x 20 and 4 more on each side
        assert (face_pixels(image, (40, 45, 60, 55), 14) > 0).all()
        assert (face_pixels(image, (39, 45, 61, 55), 14) < 0).any()


def test_photomakers_own_lora_is_added_for_good_and_leaves_no_adapter(tmp_path):
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4, in_channels=4,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4), cross_attention_dim=6,
        use_linear_projection=True,
    ).eval()  # fmt: skip
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    place = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    a, b = tensor(2, 16), tensor(16, 2, seed=1)
    weights = {f"unet.{place}.lora_A.weight": a, f"unet.{place}.lora_B.weight": b}
    fuse_lora(unet, weights, StableDiffusionXLPipeline)
    after = unet.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        expected = before[name] + b @ a if name == f"{place}.weight" else before[name]
        torch.testing.assert_close(value, expected)
