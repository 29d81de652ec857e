import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from tests.contracts.guidance import GuidanceContract
from trainers.guidance import ClassifierFree, Guidance


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


def test_an_unknown_kind_is_answered_with_the_known_ones():
    with pytest.raises(ValidationError, match="unknown kind 'cgf'; expected one of cfg"):
        TypeAdapter(Guidance).validate_python({"kind": "cgf"})


def test_an_infinite_scale_is_refused():
    with pytest.raises(ValidationError, match="finite"):
        ClassifierFree(scale=float("inf"))


def test_every_kind_passes_the_contract():
    tested = {type(guidance).model_fields["kind"].default for guidance in TestClassifierFree.guidances}
    assert set(Guidance.kinds()) == tested
