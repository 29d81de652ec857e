"""Options that make no sense are refused when a study is read."""

import pytest

from tests.trainers.test_options import AVERAGED, SAMPLES
from trainers.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"kind": "schedule_free"}}, "averages in place of a falling"),
        ({**AVERAGED["schedule_free"], "ema": {}}, "ema with an optimizer that averages"),
        ({"weak_fraction": 0.01}, "weak_fraction 0.01 of 6 steps is step 0"),
        ({"weak_fraction": 0.99}, "is step 6; expected one between the first and the last"),
        ({"validation": {}}, "validation needs captioned pictures"),
        ({"samples": {**SAMPLES, "seeds": [1, 1]}}, "listed twice"),
        ({"optimizer": {"kind": "prodigy"}, "text_encoder_lora": {"rank": 2}}, "set every lr_scale to 1"),
        ({"attention": "fast"}, "Input should be 'auto'"),
        ({"optimizer": {"kind": "sgd"}}, "unknown kind 'sgd'"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_a_package_that_is_not_installed_is_named_before_the_model_is_read(make_config, monkeypatch):
    monkeypatch.setattr("trainers.optim.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="prodigyopt is not installed"):
        make_config(optimizer={"kind": "prodigy"}, backbone={"kind": "sdxl", "path": "/nowhere"}).check()


def test_what_training_is_to_draw_is_looked_at_before_it_begins(make_config):
    samples = {"every": 3, "prompts": [{"text": "a zog", "label": [1, 2, 3]}], "resolution": 64, "steps": 1}
    with pytest.raises(ConfigError, match=r"^train\.samples: the prompt 'a zog \(1 2 3\)' says more than words"):
        make_config(samples=samples).check()


def test_a_seed_of_a_sample_is_a_whole_number_from_nought(make_config):
    samples = {"every": 3, "prompts": ["a zog"], "resolution": 64, "steps": 1}
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=r"samples\.seeds\.0"):
            make_config(samples=samples | {"seeds": [seed]})
