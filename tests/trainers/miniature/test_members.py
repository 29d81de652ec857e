import copy
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline

from trainers.miniature import recipe, refiner, sana, sana_training, sd
from trainers.miniature.generator import encode
from trainers.miniature.pictures import plain
from trainers.miniature.quality import listening, obedience, scenes
from trainers.miniature.scorers import tokens
from trainers.miniature.teacher import Teacher
from trainers.miniature.world import caption, draw, random_placement, words

FAMILY = Path(recipe.__file__).parent / "weights"


@pytest.fixture(scope="module")
def teacher():
    return Teacher.load(FAMILY)


@pytest.fixture(scope="module")
def pictures():
    return plain(16, seed=4)


@pytest.fixture(scope="module")
def texts(pictures):
    return [caption(scene) for scene in pictures.scenes]


@pytest.fixture(scope="module")
def student(teacher, texts):
    torch.manual_seed(0)
    return sd.from_sdxl(teacher, tokens(teacher.tokenizer, texts))


@torch.no_grad()
def test_an_sd_model_starts_close_to_the_base(teacher, student, pictures, texts):
    torch.manual_seed(1)
    x0 = encode(teacher.vae, pictures) * teacher.vae.config.scaling_factor
    noise, t = torch.randn_like(x0), torch.full((len(x0),), 400)
    x_t = sd._PROCESS.add_noise(x0, noise, t)
    seen = teacher.noise(x_t, t, texts)
    found = student.unet(x_t, t, student.embed(texts)).sample
    assert (found - seen).square().mean() < 0.05


@torch.no_grad()
def test_its_last_hidden_state_starts_close_to_the_penultimate_one(teacher, student, texts):
    ids = tokens(teacher.tokenizer, texts)
    wanted = teacher.text_encoders[0](ids, output_hidden_states=True).hidden_states[-2]
    found = student.embed(texts)
    alike = torch.nn.functional.cosine_similarity(found, wanted, dim=-1)
    assert alike.mean() > 0.9


def test_a_v_model_takes_over_all_that_has_a_place(student):
    v = sd.from_epsilon(student)
    given = student.unet.state_dict()
    for name, tensor in v.unet.state_dict().items():
        assert torch.equal(tensor.flatten(), given[name].flatten()), name
    assert set(given) - set(v.unet.state_dict()) == {name for name in given if name.startswith("mid_block.")}


def test_a_velocity_target_is_that_of_the_noise(student):
    torch.manual_seed(0)
    x0, noise, t = torch.randn(3, 12, 8, 8), torch.randn(3, 12, 8, 8), torch.tensor([5, 500, 990])
    process = sd._PROCESS
    found = sd._target("v_prediction", process.add_noise(x0, noise, t), noise, t)
    torch.testing.assert_close(found, process.get_velocity(x0, noise, t), rtol=1e-3, atol=1e-3)


@dataclass(frozen=True)
class AllKnowing:
    """Sees the very noise."""

    true: torch.Tensor

    def noise(self, _x_t, _t, _texts):
        return self.true


def test_a_teacher_that_sees_the_noise_teaches_the_true_velocity():
    torch.manual_seed(0)
    x0, noise = torch.randn(6, 12, 8, 8), torch.randn(6, 12, 8, 8)
    sigma = torch.tensor([0.001, 0.02, 0.1, 0.5, 0.8, 0.9])
    found = sana_training.seen_velocity(AllKnowing(noise), x0, noise, sigma, [""] * 6)
    error = (found - (noise - x0)).square().mean(dim=(1, 2, 3)).sqrt()
    # Between two of the teacher's timesteps the nearest one is asked.
    assert (error < 0.06).all(), error


@pytest.fixture(scope="module")
def sana_parts():
    torch.manual_seed(0)
    tokenizer = sana.build_gemma_tokenizer()
    parts = sana.SanaDenoiser(sana.build_transformer(), sana.build_gemma(tokenizer), tokenizer)
    parts.transformer.eval()
    parts.text_encoder.eval()
    return parts


def test_every_word_of_the_world_is_one_gemma_token_and_any_other_word_still_has_some(sana_parts):
    tokenizer = sana_parts.tokenizer
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words())
    assert all(len(tokenizer.tokenize(f"a {word}")) == 2 for word in words())
    assert len(tokenizer.tokenize("sks")) > 1
    assert tokenizer.unk_token_id not in tokenizer("sks é 犬").input_ids


@torch.no_grad()
def test_prompts_are_embedded_as_the_stock_sana_pipeline_does(sana_parts, tmp_path):
    sana.save_sana(tmp_path, sana.build_dc_ae(0.3), copy.deepcopy(sana_parts))
    pipeline = SanaPipeline.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True)
    parts = sana.SanaDenoiser(pipeline.transformer, pipeline.text_encoder, pipeline.tokenizer)
    text = "a red star on a blue background"
    hidden, mask, null, null_mask = pipeline.encode_prompt(
        text,
        device="cpu",
        max_sequence_length=sana.MAX_LENGTH,
        complex_human_instruction=(tmp_path / "instruction.txt").read_text().split("\n"),
    )
    found = parts.embed([text, ""])
    assert torch.equal(found.mask, torch.cat([mask, null_mask]))
    kept = found.mask.bool()
    torch.testing.assert_close(found.hidden[kept], torch.cat([hidden, null])[kept])


@torch.no_grad()
def test_padding_changes_nothing(sana_parts):
    x_t, sigma, said = torch.randn(2, 12, 8, 8), torch.tensor([0.3, 0.7]), ["a red star", ""]
    long, short = (sana_parts.velocity(x_t, sigma, sana_parts.embed(said, length)) for length in (48, 20))
    torch.testing.assert_close(long, short)


@torch.no_grad()
def test_a_refiner_starts_without_a_sense_of_scores(teacher):
    unet = refiner.from_base(teacher, 0)
    assert unet.config.projection_class_embeddings_input_dim == 64 + 5 * 8
    found = []
    for score in (2.0, 7.0):
        torch.manual_seed(0)
        given = (torch.zeros(2, 12, 8, 8), torch.full((2,), score))
        found.append(refiner.refining_errors(unet, teacher, given, torch.tensor([0, 200]), ["a red star", ""]))
    assert torch.equal(*found)


def test_a_model_that_listens_needs_the_right_caption():
    pictures = plain(10, seed=2)
    wanted = [caption(scene) for scene in pictures.scenes]

    def errors(rows, _time, said):
        return torch.tensor(
            [1.0 if text == wanted[row] else 2.0 for row, text in zip(rows.tolist(), said, strict=True)]
        )

    numbers = listening(errors, pictures).numbers()
    assert numbers == {"loss_right": 1.0, "loss_wrong": 2.0, "loss_empty": 2.0, "wrong_over_right": 2.0}


def test_pictures_of_the_wanted_scenes_are_obedient():
    wanted = scenes(2, seed=3)
    placed = [draw(scene, random_placement(random.Random(5))) for scene in wanted]
    pictures = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 127.5 - 1 for one in placed])
    assert obedience(pictures, wanted)["whole"] > 0.8
    assert obedience(pictures, wanted[::-1])["whole"] < 0.4
