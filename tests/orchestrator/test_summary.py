"""The table of winners, and the strip of pictures: the searched number across, subjects down, the best at the end."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from orchestrator.confirm import Confirmation, Standing, find_contest
from orchestrator.spec import StudySpec
from orchestrator.summary import Found, strip, table
from orchestrator.tracker import TrialView
from orchestrator.views import run_dir
from tests.orchestrator.studies import TREE, load
from trainers.rundir import write_atomically

SCALE, OMEGA = "evaluate.guidance.scale", "evaluate.guidance.omega"


def study(folder: Path, name: str, **changes: Any) -> StudySpec:
    """A search of the scale."""
    search = {SCALE: {"kind": "float", "low": -10, "high": 10}}
    (folder / "study.yaml").write_text(
        yaml.safe_dump({**TREE, "name": name, "search": search, **changes}, sort_keys=False)
    )
    return load(folder)


def judged(spec: StudySpec, values: Mapping[tuple[float, ...], float], broken: tuple[int, ...] = ()) -> list[TrialView]:
    """Trials that drew a picture each, by the values of what was searched."""
    trials: list[TrialView] = []
    for number, (place, value) in enumerate(values.items()):
        run = run_dir(spec.root, number)
        run.samples.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(run.samples / "0000_a-zog_0.png")
        params = dict(zip(spec.search, place, strict=True))
        violations = {"clip_t.at_least": 0.1} if number in broken else {}
        views: dict[str, Any] = {"state": "COMPLETE", "reason": None, "start": None, "end": None}
        trials.append(TrialView(number=number, params=params, values=[value], run=run, violations=violations, **views))
    return trials


def found(spec: StudySpec, trials: list[TrialView], winner: int) -> Found:
    return Found(spec.name, spec, trials, trials[winner], (trials[winner].values or [0.0])[0])


def numbers(pictures: Mapping[tuple[str, str], Path]) -> dict[tuple[str, str], int]:
    """Trials by row, but for the prompt that it names, and column."""
    prompt = TREE["trial"]["evaluate"]["prompts"][0]
    assert all(row.endswith(f": {prompt}") for row, _ in pictures)
    return {(row.partition(":")[0], column): int(file.parents[1].name) for (row, column), file in pictures.items()}


def test_rows_have_the_places_that_all_share_and_the_winner_at_the_end(tmp_path: Path):
    a, b = study(tmp_path, "a"), study(tmp_path, "b")
    first = judged(a, {(5.0,): 0.9, (-10.0,): 0.1, (10.0,): 0.2, (6.25,): 0.8})
    second = judged(b, {(5.0,): 0.1, (-10.0,): 0.3, (10.0,): 0.2})
    upper, lower = "a, best scale 6.25", "b, best scale -10"
    assert numbers(strip([found(a, first, 3), found(b, second, 1)])) == {
        (upper, "-10"): 1, (upper, "5"): 0, (upper, "10"): 2, (upper, "best"): 3,
        (lower, "-10"): 1, (lower, "5"): 0, (lower, "10"): 2, (lower, "best"): 1,
    }  # fmt: skip


def test_of_two_numbers_each_line_is_a_row_whose_best_keeps_all_bounds(tmp_path: Path):
    guidance = {"kind": "wig", "omega": 0.0}
    trial = {**TREE["trial"], "evaluate": {**TREE["trial"]["evaluate"], "guidance": guidance}}
    search = {
        SCALE: {"kind": "float", "low": -10, "high": 10},
        OMEGA: {"kind": "float", "low": 0, "high": 1, "step": 1},
    }
    spec = study(tmp_path, "w", trial=trial, search=search)
    trials = judged(spec, {(5.0, 0.0): 0.5, (3.0, 0.0): 0.9, (5.0, 1.0): 0.4, (3.0, 1.0): 0.3}, broken=(1,))
    upper, lower = "w omega 0.0, best scale 5", "w omega 1.0, best scale 5"
    assert numbers(strip([found(spec, trials, 2)])) == {
        (upper, "3"): 1, (upper, "5"): 0, (upper, "best"): 0, (lower, "3"): 3, (lower, "5"): 2, (lower, "best"): 2,
    }  # fmt: skip


def test_a_study_that_searches_no_continuous_number_has_no_strip(tmp_path: Path):
    spec = study(tmp_path, "r", search={"train.lora.rank": {"kind": "categorical", "choices": [4, 8, 16]}})
    assert strip([found(spec, judged(spec, {(4,): 0.5}), 0)]) == {}


def test_the_table_has_the_winners_value_and_gains_on_fresh_seeds(tmp_path: Path):
    spec = study(tmp_path, "a")
    trials = judged(spec, {(5.0,): 0.8, (-10.0,): 0.9})
    standings = (
        Standing(name="trial 1", trial=1, value=0.6, difference=0, low=0, high=0),
        Standing(name="trial 0", trial=0, value=0.5, difference=-0.1, low=-0.3, high=0.2),
        Standing(name="base", trial=None, value=0.25, difference=-0.35, low=-0.5, high=-0.2),
    )
    fresh = Confirmation(winner=1, num_samples=4, standings=standings)
    write_atomically(find_contest(spec, trials).file, fresh.model_dump_json())
    (row,) = csv.DictReader(table([found(spec, trials, 1)]).splitlines())
    assert (row["value"], row["value on fresh seeds"]) == ("0.9", "0.6")
    assert (row["gain over defaults"], row["defaults low"], row["defaults high"]) == ("0.1", "-0.2", "0.3")
    assert (row["gain over base"], row["base low"], row["base high"]) == ("0.35", "0.2", "0.5")
