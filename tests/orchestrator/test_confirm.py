# pyright: basic
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.metrics.prior_preservation import PriorPreservation
from evaluation.records import Record, write_records
from evaluation.statistics import estimate
from orchestrator.commands.best import _confirmed
from orchestrator.confirm import Contest, find_contest, fresh_seeds, main, read_confirmation, stand, winning_trial
from orchestrator.objective import WeightedObjective
from orchestrator.panels import picture_values
from orchestrator.spec import StudySpec, TrialSpec, load_study
from orchestrator.tracker import TrialView
from orchestrator.views import run_dir
from trainers.rundir import RunDir, Score, freeze, write_atomically

STUDY = Path(__file__).parents[2] / "studies" / "hpo.yaml"


def test_fresh_seeds_are_none_that_a_study_would_list() -> None:
    spec, _ = load_study(STUDY)
    assert not set(fresh_seeds(8)) & set(spec.trial.evaluate.seeds)
    assert len(set(fresh_seeds(8))) == 8


def test_the_mean_of_the_pictures_values_is_the_objectives_value() -> None:
    objective = WeightedObjective(weights={"a": 2.0, "b": 0.5})
    pictures = [{"a": 0.1, "b": 3.0}, {"a": 0.5, "b": 1.0}]
    up = {"a": True, "b": False}
    means = {
        name: Score(
            mean=sum(values[name] for values in pictures) / 2,
            standard_error=0.1,
            num_samples=2,
            model="m",
            higher_is_better=up[name],
        )
        for name in up
    }
    values = [objective.sample_values(picture, up)[0] for picture in pictures]
    assert sum(values) / 2 == pytest.approx(objective.values(means)[0])


def test_pictures_are_paired_by_prompt_and_seed() -> None:
    spec, _ = load_study(STUDY)
    values = dict.fromkeys(spec.trial.evaluate.metrics, 1.0)
    records = [Record(prompt="p", seed=seed, file="f", values=values) for seed in (3, 4)]
    assert set(picture_values(spec, records)) == {("p", 3), ("p", 4)}


def test_a_score_that_few_prompts_have_counts_in_the_mean_as_it_does_in_the_objective() -> None:
    spec, _ = load_study(STUDY)
    pres = PriorPreservation(model=Path("/x"))
    evaluate = spec.trial.evaluate
    evaluate = evaluate.model_copy(update={"metrics": {"clip_t": evaluate.metrics["clip_t"], "pres": pres}})
    trial = spec.trial.model_copy(update={"evaluate": evaluate})
    objective = WeightedObjective(weights={"clip_t": 2.0, "pres": 0.5})
    spec = spec.model_copy(update={"trial": trial, "objective": objective})
    told, asked = {"a": [0.1, 0.2], "b": [0.3, 0.5], "c": [0.9, 0.1]}, {"any": [0.7, 0.4]}
    pictures = [(name, prompt, seed, value) for name, group in (("clip_t", told), ("pres", asked))
                for prompt, values in group.items() for seed, value in enumerate(values)]  # fmt: skip
    records = [Record(prompt=p, seed=seed, file="f", values={name: value}) for name, p, seed, value in pictures]
    found = picture_values(spec, records)
    expected = 2.0 * np.mean(list(told.values())) - 0.5 * np.mean(asked["any"])
    assert estimate(found).mean == pytest.approx(expected)


def contest(folder: Path, *candidates: int, defaults_can_win: bool = True) -> Contest:
    spec, _ = load_study(STUDY, [f"output={folder}", "confirm_seeds=2"])
    return Contest(spec, candidates, defaults_can_win)


def panel(rng: np.random.Generator, quality: float) -> dict[tuple[str, int], float]:
    return {(f"prompt {p}", seed): quality + float(rng.normal(0, 0.01)) for p in range(8) for seed in range(2)}


def test_the_best_on_fresh_seeds_wins_and_everyone_is_compared_with_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    quality = {"trial 5": 0.3, "trial 2": 0.9, "trial 7": 0.6, "defaults": 0.5, "base": 0.1}
    panels = {name: panel(rng, value) for name, value in quality.items()}
    found = stand(contest(tmp_path, 5, 2, 7), panels)
    assert found.winner == 2
    assert [one.name for one in found.standings] == ["trial 2", "trial 7", "defaults", "trial 5", "base"]
    assert [one.trial for one in found.standings] == [2, 7, 0, 5, None]
    for one in found.standings:
        expected = np.mean([panels[one.name][key] - panels["trial 2"][key] for key in panels["base"]])
        assert one.difference == pytest.approx(expected)
        assert one.low <= one.difference <= one.high
    assert [one.verdict for one in found.standings] == ["not clearly different", *["worse"] * 4]


def test_a_lucky_base_never_wins(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    found = stand(contest(tmp_path, 1), {"trial 1": panel(rng, 0.2), "base": panel(rng, 0.8)})
    assert found.winner == 1
    assert found.standings[1].verdict == "better"


def test_pictures_without_a_value_are_left_out_of_a_difference_and_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    panels = {"trial 1": panel(rng, 0.5), "base": panel(rng, 0.5)}
    panels["trial 1"]["prompt 0", 0] = panels["base"]["prompt 0", 0] = panels["base"]["prompt 3", 1] = float("nan")
    found = stand(contest(tmp_path, 1), panels)
    assert found.standings[1].num_undefined == 2


def without_values(panel: dict[tuple[str, int], float], first: int = 0) -> dict[tuple[str, int], float]:
    return {key: float("nan") if place >= first else value for place, (key, value) in enumerate(panel.items())}


@pytest.mark.parametrize("count", [0, 1], ids=["none", "one that nobody else has"])
def test_a_trial_without_a_value_to_compare_does_not_keep_the_others_from_being_ranked(
    tmp_path: Path, count: int
) -> None:
    rng = np.random.default_rng(0)
    panels = {name: panel(rng, value) for name, value in {"trial 5": 0.3, "trial 2": 0.9, "base": 0.1}.items()}
    panels["trial 5"]["prompt 0", 0] = panels["trial 2"]["prompt 0", 0] = float("nan")
    panels["trial 7"] = without_values(panel(rng, 0.6), count)
    asked = contest(tmp_path, 7, 5, 2)
    found = stand(asked, panels)
    assert found.winner == 2
    assert [one.name for one in found.standings] == ["trial 2", "trial 5", "base", "trial 7"]
    assert found.standings[-1].verdict == "not comparable"
    assert len(found.evidence(asked).values) == 2 + count
    write_atomically(asked.file, found.model_dump_json())
    trials = [trial(tmp_path, number, value) for number, value in ((5, 0.3), (2, 0.2), (7, 0.4))]
    text = "\n".join(_confirmed(asked.spec, trials))
    said = "no value" if count == 0 else "0.6"
    assert re.search(rf"trial 7: {said}\S* \(0.4000 in the study\): not comparable \(16 pictures", text)


def test_the_best_of_the_study_stays_the_winner_if_no_trial_has_a_value_on_fresh_seeds(tmp_path: Path) -> None:
    asked = contest(tmp_path, 2, 1)
    none = without_values(panel(np.random.default_rng(0), 0.5))
    write_atomically(asked.file, stand(asked, {"trial 1": none, "trial 2": none, "base": none}).model_dump_json())
    trials = [trial(tmp_path, number, value) for number, value in ((1, 0.3), (2, 0.4))]
    assert winning_trial(asked.spec, trials)[0].number == 2
    text = "\n".join(_confirmed(asked.spec, trials))
    assert "no trial has a value on fresh seeds: the best of the study stays" in text


@pytest.mark.parametrize(("can_win", "winner"), [(True, 0), (False, 1)])
def test_defaults_that_are_the_best_on_fresh_seeds_win_unless_they_break_a_bound(
    tmp_path: Path, can_win: bool, winner: int
) -> None:
    rng = np.random.default_rng(0)
    panels = {"trial 1": panel(rng, 0.2), "defaults": panel(rng, 0.8), "base": panel(rng, 0.1)}
    found = stand(contest(tmp_path, 1, defaults_can_win=can_win), panels)
    assert found.winner == winner
    assert next(one for one in found.standings if one.name == "defaults").difference >= 0


def trial(folder: Path, number: int, value: float | None) -> TrialView:
    state, values = ("FAIL", None) if value is None else ("COMPLETE", [value])
    return TrialView(number, state, {}, values, None, RunDir(folder / f"{number:04d}"), None, None)


def test_the_few_best_of_the_study_are_candidates(tmp_path: Path) -> None:
    spec = contest(tmp_path).spec
    trials = [trial(tmp_path, number, value) for number, value in enumerate((0.1, 0.8, None, 0.8, 0.9, 0.2))]
    assert find_contest(spec, trials).candidates == (4, 1, 3)
    assert find_contest(spec, trials[:3]).candidates == (1, 0)
    assert find_contest(spec, trials).defaults_can_win
    assert not find_contest(spec, trials[1:]).defaults_can_win


def test_the_winner_is_that_of_the_fresh_seeds_once_they_are_known(tmp_path: Path) -> None:
    trials = [trial(tmp_path, number, value) for number, value in enumerate((0.1, 0.8, 0.7))]
    asked = contest(tmp_path, 1, 2, 0)
    assert winning_trial(asked.spec, trials)[0].number == 1
    rng = np.random.default_rng(0)
    found = stand(asked, {f"trial {number}": panel(rng, 0.1 * number) for number in (0, 1, 2)})
    write_atomically(asked.file, found.model_dump_json())
    winner, value = winning_trial(asked.spec, trials)
    assert (winner.number, value) == (2, 0.7)


def test_best_says_so_if_the_model_before_training_is_better(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    asked = contest(tmp_path, 1, 0, 2)
    trials = [trial(tmp_path, number, value) for number, value in enumerate((0.2, 0.3, 0.1))]
    panels = {f"trial {number}": panel(rng, 0.2) for number in asked.candidates}
    for base, expected in ((0.8, True), (0.1, False)):
        found = stand(asked, panels | {"base": panel(rng, base)})
        write_atomically(asked.file, found.model_dump_json())
        text = "\n".join(_confirmed(asked.spec, trials))
        assert ("no trial is better than the model before training" in text) is expected


def test_the_job_judges_candidates_defaults_and_base_and_writes_table_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = contest(tmp_path, 2, 1)
    text, _ = freeze(asked.spec.trial.model_dump(mode="json"))
    for number in range(3):
        write_atomically(run_dir(asked.spec.root, number).trial, text)
        write_atomically(run_dir(asked.spec.root, number).result, "{}")
    quality = {"trial-2": 0.4, "trial-1": 0.7, "defaults": 0.2, "base": 0.1}

    def draw(spec: StudySpec, frozen: TrialSpec, adapter: Path | None, run: RunDir) -> None:
        """In the place of models: a picture of each contestant, and how good it is."""
        assert (adapter is None) is (run.path.name == "base")
        run.samples.mkdir(parents=True)
        records: list[Record] = []
        for prompt in ("a", "b"):
            Image.new("RGB", (8, 8)).save(run.samples / f"{prompt}.png")
            values = dict.fromkeys(frozen.evaluate.metrics, quality[run.path.name])
            seeds = fresh_seeds(spec.confirm_seeds)
            records += [Record(prompt=prompt, seed=seed, file=f"samples/{prompt}.png", values=values) for seed in seeds]
        write_records(run.records, records)

    monkeypatch.setattr("orchestrator.confirm._draw", draw)
    text, digest = freeze({"study": asked.spec.model_dump(mode="json"), "candidates": [2, 1], "defaults_can_win": True})
    write_atomically(asked.run.trial, text)
    assert main([str(asked.run.path), "--sha256", digest]) == 0
    found = read_confirmation(asked)
    assert found is not None
    assert (found.winner, found.num_samples) == (1, 4)
    assert [one.name for one in found.standings] == ["trial 1", "trial 2", "defaults", "base"]
    assert [row.split(",")[-2] for row in asked.table.read_text().splitlines()] == ["verdict", "winner", *["worse"] * 3]
    assert asked.picture.is_file()
