"""Decisions against Optuna's pruners, on histories in which both are defined the same way."""

import math
import random
from collections.abc import Sequence

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from orchestrator.pruners import AshaPruner, Curve, HyperbandPruner, MedianPruner, PercentilePruner, WilcoxonPruner


def optunas(pruner: optuna.pruners.BasePruner, own: Curve, others: Sequence[Curve]) -> bool:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    for curve in others:
        state = TrialState.COMPLETE if curve.final is not None else TrialState.RUNNING
        reports = dict(curve.reports)
        study.add_trial(
            create_trial(
                state=state,
                value=curve.final,
                params={"x": 0.0},
                distributions={"x": FloatDistribution(0, 1)},
                intermediate_values=reports,
            )
        )
    trial = study.ask()
    for step, value in own.reports.items():
        trial.report(value, step)
    return pruner.prune(study, study.trials[trial.number])


@pytest.mark.parametrize("seed", range(20))
def test_the_median_is_optunas(seed: int):
    rng = random.Random(seed)
    others = [Curve(n, {10: rng.random()}, final=rng.random()) for n in range(7)]  # odd: the median is one of them
    own = Curve(7, {10: rng.random()})
    assert MedianPruner().prunes(own, others) == optunas(optuna.pruners.MedianPruner(), own, others)


def test_the_best_quarter_goes_on():
    others = [Curve(n, {10: float(n)}, final=float(n)) for n in range(8)]
    kept = [value for value in range(8) if not PercentilePruner().prunes(Curve(9, {10: value + 0.5}), others)]
    assert kept == [5, 6, 7]  # beaten by two of eight, by one, by none


def test_nothing_is_pruned_before_enough_trials_were_scored():
    others = [Curve(n, {10: 1.0}, final=1.0) for n in range(4)]
    assert not MedianPruner().prunes(Curve(5, {10: 0.0}), others)
    assert MedianPruner().prunes(Curve(5, {10: 0.0}), [*others, Curve(4, {10: 1.0}, final=1.0)])
    assert not MedianPruner(warmup_steps=11).prunes(Curve(5, {10: 0.0}), others * 2)


@pytest.mark.parametrize("seed", range(20))
def test_successive_halving_decides_as_optunas_does(seed: int):
    rng = random.Random(seed)
    ours, theirs = AshaPruner(min_steps=1), optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    study = optuna.create_study(direction="maximize")
    curves: list[Curve] = []
    for number in range(25):
        trial, reports = study.ask(), dict[int, float]()
        curves.append(Curve(number, reports))
        for step in range(1, 11):
            reports[step] = rng.random()
            trial.report(reports[step], step)
            decided = theirs.prune(study, study.trials[number])
            assert ours.prunes(curves[-1], curves[:-1]) == decided
            if decided:
                break
        study.tell(trial, state=TrialState.PRUNED)


def test_hyperband_has_the_races_of_optunas_and_each_decides_later_than_the_one_before():
    ours = HyperbandPruner(min_steps=1, max_steps=27)
    theirs = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=27, reduction_factor=3)
    theirs._try_initialization(optuna.create_study())
    assert ours.shares() == theirs._trial_allocation_budgets
    races = [ours.race(number) for number in range(200)]
    assert set(races) == {0, 1, 2, 3}
    for number in range(20):
        rival = next(n for n in range(100, 200) if races[n] == races[number])
        stranger = next(n for n in range(100, 200) if races[n] != races[number])
        first = 3 ** races[number]
        own = Curve(number, {first: 0.1})
        assert ours.prunes(own, [Curve(rival, {first: 0.2})])
        assert not ours.prunes(own, [Curve(stranger, {first: 0.2})])
        assert first == 1 or not ours.prunes(Curve(number, {first - 1: 0.1}), [Curve(rival, {first - 1: 0.2})])


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("seed", range(20))
def test_the_test_over_prompts_is_optunas(seed: int):
    rng = random.Random(seed)
    best = [rng.random() for _ in range(8)]
    own = [value + rng.uniform(-0.4, 0.25) for value in best]
    decided = WilcoxonPruner().prunes(Curve(1, {50: 0.0}, {50: own}), [Curve(0, {50: 0.0}, {50: best}, final=9.0)])
    prompts = Curve(1, dict(enumerate(own)))
    expected = optunas(optuna.pruners.WilcoxonPruner(), prompts, [Curve(0, dict(enumerate(best)), final=9.0)])
    assert decided == expected


@pytest.mark.parametrize("pruner", [MedianPruner(startup_trials=1), AshaPruner(min_steps=10)])
def test_an_undefined_report_ends_a_trial(pruner: MedianPruner | AshaPruner):
    assert pruner.prunes(Curve(1, {10: math.nan}), [Curve(0, {10: 0.1}, final=0.1)])
