import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from trainers.miniature.family import build_tokenizer
from trainers.miniature.pictures import plain, spoil, to_unit, wide
from trainers.miniature.truth import compare
from trainers.miniature.world import (
    COLOURS,
    STYLES,
    SUBJECTS,
    Placement,
    Scene,
    caption,
    draw,
    is_held_out,
    random_placement,
    random_scene,
    subject,
    words,
)


def picture(scene: Scene, placement: Placement) -> torch.Tensor:
    return to_unit(torch.from_numpy(np.array(draw(scene, placement))).permute(2, 0, 1)[None])


def test_every_caption_is_made_of_known_words() -> None:
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(200)]
    scenes += [subject(name, "blue") for name in SUBJECTS]
    scenes += [replace(random_scene(rng, portraits=0), style=style) for style in STYLES]
    assert {word for scene in scenes for word in caption(scene).split()} <= set(words())


def test_captions_have_the_right_article() -> None:
    assert caption(Scene("orange", "star", "solid", "red")) == "a red star on an orange background"
    assert caption(Scene("blue", "star", "solid", "orange"), "short") == "an orange star"


def test_every_word_of_the_world_is_one_token_and_any_other_word_still_has_some() -> None:
    tokenizer = build_tokenizer()
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words())
    assert len(tokenizer.tokenize("sks")) > 1
    assert tokenizer.unk_token_id not in tokenizer("sks é 犬").input_ids[1:-1]


def test_the_generator_sees_no_held_out_subject_or_style() -> None:
    assert not any(is_held_out(scene) for scene in plain(60, seed=3).scenes)


def test_a_held_out_look_is_recognised_on_any_background_and_by_any_name() -> None:
    assert is_held_out(replace(subject("zog", "red"), name="", outlined=False))
    assert not is_held_out(Scene("red", "star", "solid", "pink"))


def test_the_wide_world_has_subjects_and_styles() -> None:
    scenes = wide(120, seed=3).scenes
    assert {scene.name for scene in scenes} - {""}
    assert {scene.style for scene in scenes} - {""}


def test_the_same_seed_draws_the_same_pictures() -> None:
    assert torch.equal(plain(4, seed=5).pixels, plain(4, seed=5).pixels)


@pytest.mark.parametrize("name", SUBJECTS)
def test_truth_knows_a_subject_wherever_it_is(name: str) -> None:
    scene = subject(name, "grey" if name != "fep" else "blue")
    found = compare(picture(scene, random_placement(random.Random(1))), scene)[0]
    assert found.subject > 0.75
    assert found.background > 0.95


def test_truth_ranks_the_subject_over_its_like_and_those_over_anything_else() -> None:
    wanted, place = subject("zog", "brown"), Placement(0.47, 0.53, 0.3)
    lookalike = Scene("brown", "star", "solid", "pink")
    other = Scene("brown", "cross", "solid", "green")
    truths = [compare(picture(scene, place), wanted)[0].subject for scene in (wanted, lookalike, other)]
    assert truths[0] > truths[1] + 0.1
    assert truths[1] > truths[2] + 0.1


def test_truth_sees_a_wrong_background() -> None:
    place = Placement()
    found = compare(picture(subject("zog", "red"), place), subject("zog", "blue"))[0]
    assert found.background < 0.05


def test_truth_gives_noise_nothing() -> None:
    noise = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert all(found.whole < 0.05 for found in compare(noise, subject("zog", "blue")))


def test_every_way_of_spoiling_changes_a_picture_and_keeps_its_range() -> None:
    x = picture(subject("zog", "blue"), Placement()).repeat(20, 1, 1, 1)
    spoiled, names = spoil(x, torch.Generator().manual_seed(0))
    assert set(names) == {"blurry", "noisy"}
    assert spoiled.abs().max() <= 1
    assert ((spoiled - x).abs().mean((1, 2, 3)) > 0.01).all()


def test_all_colours_can_be_told_apart_by_the_truth() -> None:
    colours = list(COLOURS)
    for a in colours:
        for b in colours:
            distance = np.abs(np.subtract(COLOURS[a], COLOURS[b])).mean()
            assert a == b or distance > 30, (a, b)
