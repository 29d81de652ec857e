"""What every kind of guidance must be."""

import pytest
from pydantic import TypeAdapter

from trainers.guidance import Guidance


class GuidanceContract:
    """Inherit, and give `guidances`: instances over the range of parameters that studies search."""

    guidances: tuple[Guidance, ...] = ()

    def test_weights_sum_to_one(self):
        for guidance in self.guidances:
            assert sum(term.weight for term in guidance.terms()) == pytest.approx(1, abs=1e-12)

    def test_some_term_is_told_the_prompt(self):
        for guidance in self.guidances:
            assert any(term.condition == "prompt" for term in guidance.terms())

    def test_no_call_is_made_twice(self):
        for guidance in self.guidances:
            conditions = [term.condition for term in guidance.terms()]
            assert len(set(conditions)) == len(conditions)

    def test_it_survives_a_study_file(self):
        for guidance in self.guidances:
            tree = guidance.model_dump(mode="json")
            assert TypeAdapter(Guidance).validate_python(tree) == guidance
