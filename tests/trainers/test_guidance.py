import itertools

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from tests.contracts.guidance import GuidanceContract
from trainers.guidance import AutoGuidance, ClassifierFree, Guidance, Interval, Term, WeightInterpolated
from trainers.version import BASE, TRAINED, WEAK, Version


class TestClassifierFree(GuidanceContract):
    guidances = tuple(ClassifierFree(scale=scale) for scale in (0.0, 1.0, 3.0, 7.5, -2.0))

    def test_it_extrapolates_from_the_null_prediction(self):
        null, prompt = np.array([1.0, -2.0]), np.array([0.5, 4.0])
        parts = {"null": null, "prompt": prompt}
        combined = sum(term.weight * parts[term.condition] for term in ClassifierFree(scale=3.0).terms())
        np.testing.assert_allclose(combined, null + 3.0 * (prompt - null))

    def test_scale_one_gives_the_null_call_no_weight(self):
        weights = {term.condition: term.weight for term in ClassifierFree(scale=1.0).terms()}
        assert weights == {"null": 0.0, "prompt": 1.0}


class TestAutoGuidance(GuidanceContract):
    guidances = tuple(
        AutoGuidance(scale=scale, cfg_scale=inner, weak=weak)
        for scale, inner, weak in itertools.product((-2.0, 0.0, 1.0, 2.5), (0.0, 1.0, 7.5), ("checkpoint", "base"))
    )

    def test_it_extrapolates_from_the_weak_models_guided_prediction_to_the_trained_ones(self):
        rng = np.random.default_rng(0)
        parts = {(version, told): rng.normal(size=3) for version in (WEAK, TRAINED) for told in ("null", "prompt")}
        combined = sum(term.weight * parts[term.version, term.condition] for term in autoguided().terms())
        weak, strong = (
            parts[version, "null"] + 4.0 * (parts[version, "prompt"] - parts[version, "null"])
            for version in (WEAK, TRAINED)
        )
        np.testing.assert_allclose(combined, weak + 2.5 * (strong - weak))

    def test_scale_one_is_classifier_free_guidance_of_the_trained_model(self):
        assert autoguided(scale=1.0).calls(0.5) == ClassifierFree(scale=4.0).calls(0.5)

    def test_without_guidance_inside_there_are_two_calls(self):
        calls = autoguided(cfg_scale=1.0).calls(0.5)
        assert calls == (Term("prompt", -1.5, WEAK), Term("prompt", 2.5))

    def test_a_weak_version_is_needed_unless_the_base_is_it(self):
        assert autoguided().needs_weak
        assert not autoguided(weak="base").needs_weak
        assert {term.version for term in autoguided(weak="base").terms()} == {BASE, TRAINED}


def autoguided(**changes):
    return AutoGuidance.model_validate({"scale": 2.5, "cfg_scale": 4.0, **changes})


class TestWeightInterpolated(GuidanceContract):
    guidances = tuple(
        WeightInterpolated(scale=scale, omega=omega) for scale in (-2.0, 0.0, 1.0, 7.5) for omega in (0.0, 0.3, 1.0)
    )

    def test_the_null_prediction_is_of_interpolated_weights(self):
        assert WeightInterpolated(scale=3.0, omega=0.3).terms() == (
            Term("null", -2.0, Version(scale=0.3)),
            Term("prompt", 3.0),
        )

    def test_omega_one_is_classifier_free_guidance(self):
        assert WeightInterpolated(scale=3.0, omega=1.0).terms() == ClassifierFree(scale=3.0).terms()

    def test_scale_one_is_the_unguided_model_at_any_omega(self):
        assert WeightInterpolated(scale=1.0, omega=0.3).calls(0.5) == (Term("prompt", 1.0),)


@pytest.mark.parametrize("omega", [-0.1, 1.1, float("nan")])
def test_weights_beyond_base_and_trained_ones_are_refused(omega):
    with pytest.raises(ValidationError, match="omega"):
        WeightInterpolated(omega=omega)


def test_an_interval_that_ends_before_it_starts_is_refused():
    with pytest.raises(ValidationError, match="expected start < end"):
        ClassifierFree(interval=Interval.model_construct(start=0.5, end=0.5).model_dump())


def test_an_unknown_kind_is_answered_with_the_known_ones():
    with pytest.raises(ValidationError, match="unknown kind 'cgf'; expected one of autoguidance, cfg, wig"):
        TypeAdapter(Guidance).validate_python({"kind": "cgf"})


def test_an_infinite_scale_is_refused():
    with pytest.raises(ValidationError, match="finite"):
        ClassifierFree(scale=float("inf"))


def test_every_kind_passes_the_contract():
    classes = (TestClassifierFree, TestAutoGuidance, TestWeightInterpolated)
    tested = {type(cls.guidances[0]).model_fields["kind"].default for cls in classes}
    assert set(Guidance.kinds()) == tested
