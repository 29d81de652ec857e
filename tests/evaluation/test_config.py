# pyright: basic

import subprocess
import sys

import pytest
from pydantic import ValidationError

from evaluation.config import EvaluateConfig
from evaluation.metric import Metric
from trainers.errors import ModelError


def build(open_clip_folder, **changes):
    tree = {
        "prompts": ["a star", "a ring"],
        "seeds": [0, 1],
        "resolution": 64,
        "metrics": {"clip_t": {"kind": "clip_text", "model": str(open_clip_folder)}},
    }
    return EvaluateConfig.model_validate(tree | changes)


def test_it_survives_a_study_file(open_clip_folder):
    config = build(open_clip_folder, guidance={"kind": "cfg", "scale": 3})
    assert EvaluateConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "at least 1"),
        ({"prompts": ["a", ""]}, "at least 1 character"),
        ({"prompts": ["a", "b", "a"]}, "'a' is listed twice"),
        ({"seeds": [1, 1]}, "'1' is listed twice"),
        ({"seeds": [-1]}, "greater than or equal to 0"),
        ({"resolution": 65}, "multiple of 8"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"scheduler": "ddmi"}, "'ddim', 'euler' or 'dpmpp_2m'"),
        ({"metrics": {}}, "at least 1"),
        ({"metrics": {"Clip T": {"kind": "clip_text", "model": "/x"}}}, "match pattern"),
        (
            {"metrics": {"x": {"kind": "fid"}}},
            "unknown kind 'fid'; expected one of aesthetic, clip_image, clip_text, dino, diversity, face_found, ",
        ),
        ({"metrics": {"x": {"kind": "clip_text", "model": "x"}}}, "expected a path that begins with"),
        ({"sampler": "ddim"}, "Extra inputs"),
        ({"class_prompts": ["a thing"]}, "class_prompts that no metric judges"),
        ({"metrics": {"pres": {"kind": "prior_preservation", "model": "/x"}}}, "metric pres judges pictures of class"),
        (
            {"class_prompts": ["a star"], "metrics": {"pres": {"kind": "prior_preservation", "model": "/x"}}},
            "'a star' is in prompts and in class_prompts",
        ),
    ],
)
def test_what_cannot_be_sampled_or_scored_is_refused(change, message, open_clip_folder):
    with pytest.raises(ValidationError, match=message):
        build(open_clip_folder, **change)


def test_a_missing_model_is_found_under_the_metrics_name(open_clip_folder, tmp_path):
    build(open_clip_folder).check()
    metrics = {"fidelity": {"kind": "clip_image", "model": str(tmp_path / "nowhere")}}
    with pytest.raises(ModelError, match=r"^metrics\.fidelity: .*nowhere: no such folder"):
        build(open_clip_folder, metrics=metrics).check()


def test_it_knows_whether_it_needs_references(open_clip_folder):
    assert not build(open_clip_folder).needs_references
    metrics = {"fidelity": {"kind": "clip_image", "model": str(open_clip_folder)}}
    assert build(open_clip_folder, metrics=metrics).needs_references


def test_validation_never_imports_torch(open_clip_folder, head_file):
    code = f"""
import sys
from pathlib import Path
from evaluation.config import EvaluateConfig
EvaluateConfig.model_validate({{
    "prompts": ["a"],
    "metrics": {{
        "t": {{"kind": "clip_text", "model": {str(open_clip_folder)!r}}},
        "i": {{"kind": "clip_image", "model": {str(open_clip_folder)!r}}},
        "a": {{"kind": "aesthetic", "model": {str(open_clip_folder)!r}, "head": {str(head_file)!r}}},
    }},
}}).check()
import evaluation.records, evaluation.statistics
sys.exit(", ".join(name for name in ("torch", "diffusers", "transformers", "open_clip") if name in sys.modules) or None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_kind_of_metric_passes_the_contract():
    from tests.contracts.metric import MetricContract
    from tests.evaluation.metrics import (
        test_aesthetic,
        test_clip,
        test_dino,
        test_diversity,
        test_identity,
        test_preference,
        test_prior_preservation,
    )

    modules = (
        test_aesthetic,
        test_clip,
        test_dino,
        test_diversity,
        test_identity,
        test_preference,
        test_prior_preservation,
    )
    tested = {
        name.removeprefix("Test")
        for module in modules
        for name, value in vars(module).items()
        if name.startswith("Test") and issubclass(value, MetricContract)
    }
    assert tested == {Metric._kinds[kind].__name__ for kind in Metric.kinds()}
