import pytest
from pydantic import TypeAdapter, ValidationError

from trainers.branching import DEFAULT_PHASES, BranchConfig, Phase, Phases, mode_at


@pytest.mark.parametrize(
    "tree",
    [
        {"branched_self": False},
        {"branched_self": False, "branched_cross": False, "train_branch_mode": "ref_only"},
        {"id_alpha": 1.5},
        {"pose_adapt_ratio": -0.1},
    ],
)
def test_configurations_that_make_no_sense_are_refused(tree):
    with pytest.raises(ValidationError):
        BranchConfig(**tree)


def phases(*pairs):
    return TypeAdapter(Phases).validate_python([{"start": start, "mode": mode} for start, mode in pairs])


@pytest.mark.parametrize("starts", [(0.1, 0.2), (0.0, 0.3, 0.2), (0.0, 0.0), ()])
def test_phases_begin_at_noise_and_go_on(starts):
    with pytest.raises(ValidationError):
        phases(*((start, "text") for start in starts))


N = 50


def original(s, b, i):
    """The table of the original: PhotoMaker from step s, the branches from step b (and until s, if that is later)."""
    if s < b:
        return "text" if i < s else "photomaker" if i < b else "branched"
    if b < s:
        return "text" if i < b else "branched" if i < s else "photomaker"
    return "text" if i < b else "branched"  # the original never gets to its branches here


@pytest.mark.parametrize(("s", "b"), [(0, 1), (10, 15), (15, 10), (0, 0), (10, 10), (0, 50), (49, 50), (20, 0)])
def test_every_row_of_the_originals_table_can_be_said(s, b):
    starts = {0: "text"}
    starts |= {s: "photomaker", b: "branched"} if s < b else {b: "branched"} | ({s: "photomaker"} if b < s else {})
    said = phases(*((step / N, mode) for step, mode in sorted(starts.items()) if step < N))
    for i in range(N):
        t = 1000 - 1 - i * (1000 // N)
        assert mode_at(said, t, 1000) == original(s, b, i), i


@pytest.mark.parametrize("steps", [5, 20, 50, 250])
def test_the_number_of_sampling_steps_does_not_move_phases(steps):
    drawn = [mode_at(DEFAULT_PHASES, 999 - i * (1000 // steps), 1000) for i in range(steps)]
    assert drawn.count("text") == 0.2 * steps
    assert drawn.count("photomaker") == pytest.approx(0.1 * steps, abs=0.5)


def test_a_noise_level_between_timesteps_has_a_phase():
    assert mode_at((Phase(start=0, mode="text"), Phase(start=0.5, mode="branched")), 499.0, 1000) == "branched"
    assert mode_at((Phase(start=0, mode="text"), Phase(start=0.5, mode="branched")), 499.4, 1000) == "text"
