import random
from collections import Counter

import pytest
from pydantic import ValidationError
from scipy.stats import chisquare

from trainers.data.mixing import Blend, MixConfig, Mixer
from trainers.errors import DataError

COUNTS = {"a": 900, "b": 90, "c": 10}
DRAWS = 4_000


def config(**changes):
    return MixConfig.model_validate({"schedule": {"kind": "constant", "value": 0.0}, **changes})


def write_table(path, rows, header="pokemon,count,fraction"):
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return str(path)


def examples(counts):
    return [(name,) if name else () for name, count in counts.items() for _ in range(count)]


def drawn(mixer, classes, step=0, draws=DRAWS):
    """How often each class is shown; of several, the first."""
    return Counter((classes[mixer.pick(0, step, position)] or ("",))[0] for position in range(draws))


def p_value(found, expected):
    """Of the hypothesis that `found` was drawn from `expected`, which need not sum to one."""
    total = sum(expected.values())
    assert not set(found) - {name for name, share in expected.items() if share}
    return chisquare([found[name] for name in expected], [share / total * DRAWS for share in expected.values()]).pvalue


@pytest.mark.parametrize("blend", [0.0, 0.2, 0.5, 0.95, 1.0])
def test_classes_are_shown_as_often_as_the_target_says(blend):
    classes = examples(COUNTS)
    mixer = Mixer(config(schedule={"kind": "constant", "value": blend}), classes)
    target = {name: (1 - blend) / 3 + blend * count / 1000 for name, count in COUNTS.items()}
    assert mixer.targets(blend) == pytest.approx(target)
    assert p_value(drawn(mixer, classes), target) > 1e-3


@pytest.mark.parametrize("blend", [0.0, 0.6])
def test_it_is_the_law_of_the_first_candidate_that_is_accepted(tmp_path, blend):
    """The stream differs from the table, and some examples are of several classes or of none."""
    table = write_table(tmp_path / "t.csv", ["a,1,0.5", "b,1,0.3", "c,1,0.2"])
    classes = examples({"a": 50, "b": 30, "c": 5, "typo": 10, "": 5}) + [("a", "c")] * 20 + [("b", "typo", "b")] * 10
    numbers = range(len(classes))
    mixer = Mixer(config(table=table, schedule={"kind": "constant", "value": blend}), classes)
    unlisted = (10 + 5 + 10 / 3) / len(classes)
    q = {"a": 0.5 * (1 - unlisted), "b": 0.3 * (1 - unlisted), "c": 0.2 * (1 - unlisted), "": unlisted}
    ratios = {name: ((1 - blend) / 4 + blend * share) / share for name, share in q.items()}
    scale = 1 / max(ratios.values())
    rng = random.Random(0)

    def accepted():
        while True:
            candidate = rng.choice(numbers)
            name = rng.choice(classes[candidate] or ("",))
            if rng.random() < scale * ratios.get(name, ratios[""]):
                return classes[candidate]

    loop = Counter(accepted() for _ in range(DRAWS))
    direct = Counter(classes[mixer.pick(0, 0, position)] for position in range(DRAWS))
    assert set(loop) == set(direct)
    # Two samples of equal size: the variance of a difference is the sum of both counts.
    statistic = sum((loop[name] - direct[name]) ** 2 / (loop[name] + direct[name]) for name in loop)
    assert statistic < 30  # 7 classes: 6 degrees of freedom, p = 4e-5


def test_the_unlisted_are_together_one_class_and_shown_by_the_same_formula(tmp_path):
    table = write_table(tmp_path / "t.csv", ["a,900,0.9", "b,100,0.1"])
    classes = examples({"a": 720, "b": 80, "typo": 100, "other": 60, "": 40})
    mixer = Mixer(config(table=table), classes)
    assert mixer.frequencies == pytest.approx({"a": 0.72, "b": 0.08, "": 0.2})
    found = drawn(mixer, classes)
    assert p_value(found, {"a": 1 / 3, "b": 1 / 3, "typo": 1 / 6, "other": 1 / 10, "": 1 / 15}) > 1e-3


def test_examples_of_a_class_are_shown_equally_often():
    classes = examples({"a": 5, "b": 95})
    mixer = Mixer(config(), classes)
    found = Counter(mixer.pick(0, 0, position) for position in range(DRAWS))
    assert p_value(found, {i: 1 / 10 if i < 5 else 1 / 190 for i in range(100)}) > 1e-3


@pytest.mark.parametrize(("choose", "share"), [("first", 1 / 4), ("random", 1 / 3)])
def test_of_several_classes_the_first_or_any_is_chosen(choose, share):
    """Counted as a alone, an example of both shares a's half with ten others; counted as either, all are alike."""
    classes = [("a",)] * 10 + [("b",)] * 10 + [("a", "b")] * 10
    mixer = Mixer(config(choose=choose), classes)
    both = Counter(mixer.pick(0, 0, position) >= 20 for position in range(DRAWS))
    assert p_value(both, {True: share, False: 1 - share}) > 1e-3


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_lambda_advances_with_the_optimizer_step(kind):
    classes = examples(COUNTS)
    mixer = Mixer(config(schedule={"kind": kind, "start": 0.0, "end": 1.0, "steps": 10}), classes)
    assert p_value(drawn(mixer, classes, step=0), dict.fromkeys(COUNTS, 1.0)) > 1e-3
    assert p_value(drawn(mixer, classes, step=5), {n: 0.5 / 3 + 0.5 * c / 1000 for n, c in COUNTS.items()}) > 1e-3
    for step in (10, 11, 1000):
        assert p_value(drawn(mixer, classes, step=step), COUNTS) > 1e-3


def test_schedules_have_the_published_shapes():
    linear = Blend.model_validate({"kind": "linear", "start": 0.2, "end": 0.95, "steps": 6000})
    cosine = Blend.model_validate({"kind": "cosine", "start": 0.2, "end": 0.95, "steps": 6000})
    assert [linear.at(step) for step in (0, 1500, 6000, 9000)] == pytest.approx([0.2, 0.3875, 0.95, 0.95])
    assert [cosine.at(step) for step in (0, 2000, 3000, 6000, 9000)] == pytest.approx([0.2, 0.3875, 0.575, 0.95, 0.95])


def test_a_pick_depends_on_seed_step_and_position_alone():
    classes = examples({"a": 500, "b": 500})
    schedule = {"kind": "linear", "steps": 50}
    first = [Mixer(config(schedule=schedule), classes).pick(0, position // 4, position) for position in range(100)]
    mixer = Mixer(config(schedule=schedule), classes)
    again = {position: mixer.pick(0, position // 4, position) for position in reversed(range(100))}
    assert first == [again[position] for position in range(100)]
    assert first != [mixer.pick(1, position // 4, position) for position in range(100)]


def test_a_class_without_examples_keeps_its_share_of_the_uniform_target(tmp_path):
    table = write_table(tmp_path / "t.csv", ["a,1,0.5", "b,1,0.25", "gone,1,0.25"])
    mixer = Mixer(config(table=table), examples({"a": 10, "b": 10}))
    assert mixer.targets(0.0) == pytest.approx(dict.fromkeys(("a", "b", "gone"), 1 / 3))


def test_classes_of_zero_frequency_are_unlisted(tmp_path):
    table = write_table(tmp_path / "t.csv", ["a,1,1.0", "b,0,0.0"])
    assert Mixer(config(table=table), examples({"a": 3, "b": 1})).frequencies == pytest.approx({"a": 0.75, "": 0.25})


def test_fractions_need_not_sum_to_one(tmp_path):
    table = write_table(tmp_path / "t.csv", ["a,3,6", "b,1,2"])
    assert config(table=table).frequencies() == pytest.approx({"a": 0.75, "b": 0.25})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a,1,0.5", "b,1,much"], r"line 3: got class 'b' with fraction 'much'"),
        (["a,1,0.5", "a,1,0.5"], r"line 3: got class 'a'"),
        (["a,1,-0.5"], "line 2"),
        (["a,1,nan"], "line 2"),
        (["a,1"], r"line 2: got class 'a' with fraction None"),
        ([",1,0.5"], "line 2"),
        (["a,0,0"], "no class has a positive fraction"),
        ([], "no class has a positive fraction"),
    ],
)
def test_a_bad_table_is_an_error_that_names_the_line(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        config(table=write_table(tmp_path / "t.csv", rows)).frequencies()


def test_a_table_without_fractions_is_an_error(tmp_path):
    with pytest.raises(DataError, match="columns are"):
        config(table=write_table(tmp_path / "t.csv", ["a,1"], header="pokemon,count")).frequencies()


def test_a_missing_table_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        config(table=str(tmp_path / "absent.csv")).frequencies()


def test_a_table_that_names_none_of_the_classes_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no example's class is in the table"):
        Mixer(config(table=write_table(tmp_path / "t.csv", ["x,1,1"])), examples({"a": 3}))


@pytest.mark.parametrize(
    "schedule",
    [
        {"kind": "constant", "value": 1.5},
        {"kind": "linear", "start": -0.1, "end": 1, "steps": 3},
        {"kind": "linear", "steps": 0},
        {"kind": "step", "steps": 3},
    ],
)
def test_a_lambda_outside_of_zero_to_one_is_refused(schedule):
    with pytest.raises(ValidationError):
        config(schedule=schedule)
