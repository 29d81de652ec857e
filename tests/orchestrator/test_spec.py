import re
from pathlib import Path

import pytest

from orchestrator.foreach import ForEach, Subject
from orchestrator.spec import StudySpec, TrialSpec
from tests.orchestrator.studies import load
from trainers.errors import ConfigError


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("trial.train.stpes=3", "trial.train.stpes: got an unknown key; .*: did you mean 'steps'?"),
        ("limits.trails=3", "limits.trails: got an unknown key; expected one that exists: did you mean 'trials'?"),
        ("trial.evaluate.metrics.clip_t.modle=./x", "clip_t.modle: got an unknown key; .* did you mean 'model'?"),
        (
            "tracker.kind=mlfow",
            "tracker.kind: got unknown kind 'mlfow'; expected one of mlflow, none, several, tensorboard, wandb; did",
        ),
        ("launcher={}", "launcher: got no `kind`; expected one of .*local"),
        ("search.train.optimizer.lr.low=1", "search.train.optimizer.lr: got low 1.0, high 0.01; expected low < high"),
        ("search.train.optimizer.lr.low=0", "got low 0.0 with log: true; expected low > 0"),
        ("search.train.optimizer.lr.step=1e-4", "got step 0.0001 with log: true"),
        ("search.train.lora.rank.choices=[8, 0]", "search.train.lora.rank: got 0, which makes an invalid trial: "
         "train.lora.rank: got 0; expected greater than 0"),
        ("search.train.lora.rank.choices=[8, 8]", "choices 8 and 8, which are equal"),
        ("search.train.lora.rnk={kind: int, low: 1, high: 2}", "search.train.lora.rnk: got an unknown path; expected "
         "one into the trial; did you mean 'train.lora.rank'?"),
        ("search.train.text_encoder_lora.rank={kind: int, low: 1, high: 2}", "null in the trial"),
        ("search.train.lora.rank=3", "search.train.lora.rank: got 3; expected a mapping"),
        ("trial.train.lora.rank=7", "search.train.lora.rank: got 7 in the trial, which the search cannot reach"),
        ("trial.train.optimizer.lr=1", "search.train.optimizer.lr: got 1.0 in the trial"),
        ("trial.train.optimizer.lr=abc", "trial.train.optimizer.lr: got 'abc'; expected a valid number"),
        ("trial.train.steps=0", "trial.train.steps: got 0; expected greater than 0"),
        ("trial.train.backbone.path=sdxl", "trial.train.backbone.path: got 'sdxl'; expected a path that begins with"),
        ("objective.name=clp_t", "objective: got score 'clp_t'; .* did you mean 'clip_t'?"),
        ("objective={kind: weighted, weights: {}}", "objective.weights: got {}; expected"),
        ("sampler.kind=grid", "sampler: got train.optimizer.lr without `step`"),
        ("name=My Study", "name: got 'My Study'; expected"),
        ("limits.trials=0", "limits.trials: got 0; expected greater than or equal to 1"),
        ("launcher={kind: local, gpus: [0], num_processes: 2}", "num_processes 2 for gpus"),
        ("search.train.steps={kind: int, low: 100, high: 350, step: 100}", "got step 100; expected one that leads"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_with_place_and_remedy(tmp_path: Path, assignment: str, message: str):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?").replace("{", r"\{")) as caught:
        load(tmp_path, assignment)
    assert "\n" not in str(caught.value)


def test_a_missing_value_is_named(tmp_path: Path):
    (tmp_path / "study.yaml").write_text("name: t\n")
    with pytest.raises(ConfigError, match=r"study\.yaml: trial: got nothing; expected a value, there is no default"):
        load(tmp_path)


def test_corners_are_also_tried_together(tmp_path: Path):
    sets = ("trial.train.schedule={kind: cosine, warmup_steps: 10}", "trial.train.steps=100")
    both = (
        "search.train.steps={kind: int, low: 50, high: 100}",
        "search.train.schedule.warmup_steps={kind: int, low: 0, high: 90}",
    )
    load(tmp_path, *sets, both[0])
    load(tmp_path, *sets, both[1])
    with pytest.raises(ConfigError, match=r"steps=50.*warmup_steps=90.*, which makes an invalid trial"):
        load(tmp_path, *sets, *both)


def test_a_weak_version_cannot_be_drawn_with_while_it_is_trained(tmp_path: Path):
    sets = ("trial.train.weak_fraction=0.5", "trial.evaluate.guidance={kind: autoguidance}")
    load(tmp_path, *sets)
    with pytest.raises(ConfigError, match=r"does not exist while training goes on.*report to null"):
        load(tmp_path, *sets, "trial.report={every: 10}")


def test_a_study_survives_being_written_and_read(tmp_path: Path):
    spec = load(tmp_path, "search.train.steps={kind: int, low: 100, high: 300, step: 100}")
    assert StudySpec.model_validate(spec.model_dump(mode="json")) == spec
    assert StudySpec.model_validate_json(spec.model_dump_json()) == spec


def test_resolve_changes_the_searched_values_alone(tmp_path: Path):
    spec = load(tmp_path)
    trial = spec.resolve({"train.optimizer.lr": 2e-3, "train.lora.rank": 16})
    tree, template = trial.model_dump(), spec.trial.model_dump()
    assert (tree["train"]["optimizer"].pop("lr"), tree["train"]["lora"].pop("rank")) == (2e-3, 16)
    assert (template["train"]["optimizer"].pop("lr"), template["train"]["lora"].pop("rank")) == (1e-3, 8)
    assert tree == template
    assert isinstance(trial, TrialSpec)


def test_the_defaults_resolve_to_the_template(tmp_path: Path):
    spec = load(tmp_path)
    assert spec.resolve(spec.defaults()) == spec.trial


def test_output_is_below_the_working_directory_unless_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    spec = load(tmp_path)
    assert StudySpec.model_validate(spec.model_dump(exclude={"output"})).root == tmp_path / "runs" / "t"


def test_a_grid_limits_the_number_of_trials(tmp_path: Path):
    sets = ("search.train.optimizer.lr={kind: categorical, choices: [1e-3, 1e-4]}", "sampler={kind: grid}")
    assert load(tmp_path, *sets).num_trials == 6
    assert load(tmp_path, *sets, "limits.trials=4").num_trials == 4


def test_names_of_any_script_make_names_of_studies_that_differ() -> None:
    slugs = [Subject(name, {}).slug for name in ("кот1", "мяч1", "солнце", "太陽", "Zög 猫", "Red Robot")]
    assert slugs[4:] == ["z-g", "red-robot"]  # which studies have long had
    assert len(set(slugs)) == 6
    assert all(re.fullmatch(r"(1-)?[0-9a-f]{8}", slug) for slug in slugs[:4])


@pytest.mark.parametrize(("names", "message"), [(["!?"], "got the name '!\\?'"), (["a b", "A-b"], "are called 'a-b'")])
def test_names_that_say_nothing_or_the_same_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ForEach.model_validate({"subject": {"kind": "names", "names": names}}).list()
