"""How much training pruners save on the miniature world, and what that costs in quality.

    python -m tests.benchmarks.pruning

The curves are measured: every rate and rank of the committed grids (results/learnability_zog.csv and _nuvo.csv) was
trained for a third of the steps and for all of them, and judged by the same scores and by pixel truth. A trial here
reports the first when it is a third of the way, and ends with the second. They were trainings of their own, each with
its own decay of the rate: in a study, the report comes from the same training, before its rate has fallen.

Trials start in random orders, so many at a time, at the same speed; the study's own pruners decide on what a controller
would know at that moment. A pruned trial's place goes to the next one of the order.
"""

# pyright: basic

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import pandas as pd

from orchestrator.pruners import AshaPruner, Curve, HyperbandPruner, MedianPruner, NoPruner, PercentilePruner, Pruner

RESULTS = Path(__file__).parent / "results"
WEIGHTS = {"clip_i": 1.0, "clip_t": 1.0, "aesthetic": 0.1}
"""The objective of studies/hpo.yaml."""
ORDERS = 2000
THIRD = 1
"""The report's step, in thirds of a training."""
WHOLE = 3
PRUNERS: dict[str, Pruner] = {
    "none": NoPruner(),
    "median": MedianPruner(),
    "median, 3 to start with": MedianPruner(startup_trials=3),
    "percentile 75": PercentilePruner(percentile=75),
    "percentile 25": PercentilePruner(percentile=25),
    "asha, eta 2": AshaPruner(min_steps=THIRD, eta=2),
    "asha, eta 3": AshaPruner(min_steps=THIRD, eta=3),
    "asha, eta 4": AshaPruner(min_steps=THIRD, eta=4),
    "hyperband, eta 2": HyperbandPruner(min_steps=THIRD, max_steps=WHOLE, eta=2),
    "hyperband, eta 3": HyperbandPruner(min_steps=THIRD, max_steps=WHOLE, eta=3),
}


@dataclass(frozen=True)
class Known:
    """A trial of the grid."""

    curve: Curve
    truth: float
    """Of its end, by pixels."""


@dataclass(frozen=True)
class Outcome:
    """Of one order of the trials."""

    saved: float
    """Share of all training that was not done."""
    loss: float
    """The best trial's value minus that of the best one that was finished."""
    truth: float
    """The same trials' difference by pixel truth."""


def read_grid(name: str) -> list[Known]:
    """Every rate and rank that was trained for a third of the steps and for all of them."""
    rows = pd.read_csv(RESULTS / f"learnability_{name}.csv")
    rows["value"] = rows[list(WEIGHTS)].mul(pd.Series(WEIGHTS)).sum(axis=1)
    trained = rows.query("rate > 0")
    first, last = sorted(trained["steps"].unique())
    ends = trained.query("steps == @last")
    both = trained.query("steps == @first").merge(ends, on=["rate", "rank"], suffixes=("", "_end"))
    assert last == WHOLE * first
    return [
        Known(Curve(number, {THIRD: row["value"]}, final=row["value_end"]), row["truth_end"])
        for number, row in enumerate(both.to_dict("records"))
    ]


def replay(trials: Sequence[Known], pruner: Pruner, parallel: int) -> Outcome:
    """One study in which trials are taken in this order; at equal times the earlier one comes first."""
    known = {number: Curve(number) for number in range(len(trials))}
    waiting, clock, now, trained = list(known), list[tuple[int, int, int]](), 0, 0
    while waiting or clock:
        while waiting and len(clock) < parallel:
            heapq.heappush(clock, (now + THIRD, waiting.pop(0), THIRD))
        now, number, step = heapq.heappop(clock)
        whole = trials[number].curve
        if step == WHOLE:
            trained += WHOLE - THIRD
            known[number] = replace(known[number], final=whole.final)
            continue
        trained += THIRD
        known[number] = Curve(number, whole.reports)
        if not pruner.prunes(known[number], [other for other in known.values() if other is not known[number]]):
            heapq.heappush(clock, (now + WHOLE - THIRD, number, WHOLE))
    finished = [trial for number, trial in enumerate(trials) if known[number].final is not None]
    best, found = (max(some, key=lambda trial: trial.curve.final or 0.0) for some in (trials, finished))
    loss = (best.curve.final or 0.0) - (found.curve.final or 0.0)
    return Outcome(1 - trained / (WHOLE * len(trials)), loss, best.truth - found.truth)


def row(name: str, trials: Sequence[Known], pruner: Pruner, parallel: int) -> str:
    rng = random.Random(0)
    found = [replay(rng.sample(trials, len(trials)), pruner, parallel) for _ in range(ORDERS)]
    losses = sorted(one.loss for one in found)
    saved, kept = fmean(one.saved for one in found), fmean(loss == 0 for loss in losses)
    truth = fmean(one.truth for one in found)
    return (
        f"| {name} | {parallel} | {saved:.0%} | {kept:.0%} | {fmean(losses):.4f} | {losses[int(0.95 * ORDERS)]:.4f} | "
        f"{truth:+.3f} |"
    )


def table(name: str) -> list[str]:
    trials = read_grid(name)
    ends = pd.Series([trial.curve.final for trial in trials])
    reports = pd.Series([trial.curve.reports[THIRD] for trial in trials])
    place = int((reports > reports[ends.idxmax()]).sum()) + 1
    return [
        f"## {name}: {len(trials)} trials",
        "",
        f"The objective at the ends: best {ends.max():.4f}, median {ends.median():.4f}, worst {ends.min():.4f}.",
        f"Rank correlation of the report with the end: {reports.rank().corr(ends.rank()):.2f}; the best at the end is",
        f"number {place} of {len(trials)} by its report.",
        "",
        "| pruner | at a time | training saved | best kept | mean loss | at most, in 95 % | mean loss of truth |",
        "| --- | --: | --: | --: | --: | --: | --: |",
        *(row(pruner, trials, PRUNERS[pruner], parallel) for parallel in (1, 4) for pruner in PRUNERS),
        "",
    ]


def main() -> None:
    lines = [
        "# What pruning saves",
        "",
        f"`python -m tests.benchmarks.pruning`: the committed grids of rate and rank, replayed in {ORDERS} random",
        "orders with one report after a third of the training (the script says how, and what the curves are). Loss is",
        "of the objective `clip_i + clip_t + 0.1 aesthetic`: the best trial's minus the best finished one's. The last",
        "column is the same two trials' difference by pixel truth (0 to 1), which no pruner sees; below 0 is luck.",
        "`wilcoxon` is missing: it compares prompt by prompt, and the grids keep the mean over prompts alone.",
        "",
        *table("zog"),
        *table("nuvo"),
    ]
    text = "\n".join(lines).rstrip() + "\n"
    (RESULTS / "pruning.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
