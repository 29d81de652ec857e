# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
import pytest
import torch
from PIL import Image

from tests.trainers.data.test_identity import ENTRY, FACE, write
from tests.trainers.photomakers import (  # noqa: F401, fixtures among them
    FOUR,
    checkpoint_fixture,
    face_folder_fixture,
    make_fixture,
    method_fixture,
    people_fixture,
    tensor,
)
from trainers.batch import Batch
from trainers.errors import DataError
from trainers.loop import fit
from trainers.rundir import RunDir


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

    def test_further_photos_are_of_the_same_person_and_all_different(self, make, accelerator):
        config = make(references=2)
        config.check()
        method = config.build(0, None, accelerator)
        one, tokens = make().build(0, None, accelerator), method._identities.seen["tokens"]
        pairs = set()
        for step in range(12):
            batch = Batch(step, (0, 1), (0, 4))
            shown = method.people(batch, [0, 1])
            assert torch.equal(shown.latents, one.people(batch, [0, 1]).latents), "branches look at the first alone"
            for row, index in enumerate(batch.indices):
                parts = shown.tokens[row].unflatten(0, (2, -1))
                photos = [next(i for i, known in enumerate(tokens) if torch.equal(known, part)) for part in parts]
                chosen = [method.examples[photo] for photo in photos]
                assert {example.identity for example in chosen} == {method.examples[index].identity}
                assert len({method.examples[index].path, *(example.path for example in chosen)}) == 3
                pairs.add(tuple(photos))
        assert len(pairs) == 4, "both orders of the two others, for either person"

    def test_the_class_word_stands_for_the_tokens_of_all_photos(self, make, accelerator):
        method = make(references=2, condition_dropout=0.0, train_id_encoder=True).build(0, None, accelerator)
        assert method._identities.words.mask.sum(1).unique().tolist() == [2 * method.photomaker.encoder.sizes.tokens]
        method.losses(FOUR).sum().backward()
        for name in ("branches", "id_encoder"):
            assert any(
                p.grad is not None and p.grad.abs().sum() > 0 for p in method.trained()[name].parameters().values()
            )

    def test_too_few_photos_for_the_references_are_found_before_anything_is_loaded(self, make):
        with pytest.raises(DataError, match=r"to train on: 3; expected at least 4"):
            make(references=3).check()

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
        monkeypatch.setattr("trainers.people.words.Reader.read", None)
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

    def test_an_embedding_of_another_length_is_named(self, make, accelerator, people, tmp_path):
        from safetensors.torch import save_file

        file = tmp_path / "some.safetensors"
        save_file({f"{who}/{i}.png": tensor(6 + (who == "berta")) for who in ("anna", "berta") for i in range(3)}, file)
        data = {"kind": "identity", "path": str(people), "resolution": 64, "embeddings": str(file)}
        with pytest.raises(DataError, match=r"some\.safetensors: .*berta/0\.png has 7 numbers; expected 6"):
            make(data=data).build(0, None, accelerator)

    def test_a_photo_without_an_embedding_is_named(self, make, accelerator, people, tmp_path):
        from safetensors.torch import save_file

        file = tmp_path / "some.safetensors"
        save_file({"anna/0.png": tensor(6)}, file)
        data = {"kind": "identity", "path": str(people), "resolution": 64, "embeddings": str(file)}
        with pytest.raises(DataError, match=r"some\.safetensors: no embedding of .*anna/1\.png"):
            make(faces=None, data=data).build(0, None, accelerator)
