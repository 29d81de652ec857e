"""What every kind of guidance must be."""

import pytest
from pydantic import TypeAdapter

from trainers.guidance import Guidance, Interval, Term


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
            made = [(term.condition, term.version) for term in guidance.terms()]
            assert len(set(made)) == len(made)

    def test_calls_without_weight_are_not_made(self):
        for guidance in self.guidances:
            assert all(term.weight != 0 for term in guidance.calls(0.5))

    def test_outside_its_interval_the_trained_model_is_told_the_prompt_alone(self):
        for guidance in self.guidances:
            limited = guidance.model_copy(update={"interval": Interval(start=0.2, end=0.6)})
            assert limited.calls(0.2) == limited.calls(0.5) == guidance.calls(0.0)
            assert limited.calls(0.1) == limited.calls(0.6) == (Term("prompt", 1.0),)

    def test_it_survives_a_study_file(self):
        for guidance in self.guidances:
            tree = guidance.model_dump(mode="json")
            assert TypeAdapter(Guidance).validate_python(tree) == guidance
