"""Does the search find what is there to be found? Its winner against the dense grid's, the defaults and the base.

    python -m tests.benchmarks.search_quality [--searches 1]

Runs `studies/hpo.yaml` once for each sampler seed, with TPE and with random search. The contestants then draw the
learnability panel with seeds that neither the searches nor the grid used, and pixel ground truth judges. The grid's
best point (from results/learnability_zog.csv, chosen by the truth itself) is trained again. Results go to
tests/benchmarks/results/search_quality.md.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from evaluation.statistics import Panel, paired_difference
from orchestrator.spec import TrialSpec
from tests.benchmarks.learnability import RESULTS, ROOT, Point, requested_truths, trial, wanted_scenes
from trainers.guidance import SamplingConfig
from trainers.prompt import Prompt, Request
from trainers.rundir import RunDir, thaw
from trainers.sampling import generate
from trainers.train import build_accelerator

STUDY = ROOT / "studies" / "hpo.yaml"
FRESH_SEEDS = tuple(range(100, 106))


def search(folder: Path, kind: str, seed: int) -> Path:
    """Run the default study with another sampler; the folder of the winning trial."""
    sets = {"output": folder, "sampler": f"{{kind: {kind}, seed: {seed}}}", "confirm_seeds": 0, "tracker.kind": "none"}
    words = [word for path, value in sets.items() for word in ("--set", f"{path}={value}")]
    subprocess.run([sys.executable, "-m", "orchestrator", "run", str(STUDY), *words], check=True, cwd=ROOT)
    best = yaml.safe_load((folder / "hpo" / "best_params.yaml").read_text())
    return folder / "hpo" / "trials" / f"{best['trial']:04d}"


def judge(frozen: Path, adapter: Path | None) -> Panel:
    """The pixel truth of a contestant on fresh seeds."""
    spec = TrialSpec.model_validate(thaw(frozen))
    model = spec.train.load_trained(adapter, build_accelerator(spec.train))
    sampling = SamplingConfig.model_validate(spec.evaluate.model_dump(include=set(SamplingConfig.model_fields)))
    scenes = wanted_scenes("zog")
    wanted = [Request(Prompt(text=text), seed) for text in scenes for seed in FRESH_SEEDS]
    return requested_truths(generate(model, wanted, sampling), scenes)


def main() -> None:
    """Search, judge and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=1, help="sampler seeds of each kind of search")
    arguments = parser.parse_args()
    grid = pd.read_csv(RESULTS / "learnability_zog.csv")
    best = grid.loc[grid.truth.idxmax()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        winners = {
            f"{kind} {seed}": search(folder / f"{kind}{seed}", kind, seed)
            for kind in ("tpe", "random")
            for seed in range(arguments.searches)
        }
        first = next(iter(winners.values())).parent / "0000"
        trial("zog", Point(best.rate, int(best["rank"]), int(best.steps)), RunDir(folder / "grid"), folder / "cache")
        panels = {"base": judge(first / "trial.yaml", None), "defaults": judge(first / "trial.yaml", first / "adapter")}
        panels |= {name: judge(path / "trial.yaml", path / "adapter") for name, path in winners.items()}
        panels["best of the grid"] = judge(first / "trial.yaml", folder / "grid" / "adapter")
    write(panels)


def write(panels: dict[str, Panel]) -> None:
    """One row a contestant."""
    lines = [
        "# Search quality",
        "",
        f"`python -m tests.benchmarks.search_quality` on {platform.machine()}, torch {torch.__version__}.",
        f"Pixel truth on {len(panels['base'])} pictures with fresh seeds; differences are paired, with 95 % intervals.",
        "The searches see 12 trials each and only the learned scores; the grid's best of 36 was chosen by the truth.",
        "",
        "| contestant | truth | minus base | minus defaults | minus best of the grid |",
        "| --- | --: | --: | --: | --: |",
    ]
    for name, panel in panels.items():
        cells = [f"{np.mean([*panel.values()]):.3f}"]
        for other in ("base", "defaults", "best of the grid"):
            gain = paired_difference(panel, panels[other])
            cells.append("" if name == other else f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    (RESULTS / "search_quality.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
