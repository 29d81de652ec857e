"""Ray Tune with OptunaSearch beside our controller: what a trial costs whoever drives, and what survives kill -9.

    python -m tests.benchmarks.ray_tune [--trials 100] [--parallel 8]

Both search two parameters by TPE over an objective that does nothing but sleep. Ray Tune's driver is a process of its
own, on a local Ray whose actors are kept for the next trial; it is killed when half of the trials have ended, and
`Tuner.restore` finishes the search, as Ray's documentation says. Every run of the objective writes a line at its begin
and at its end, so that what was done twice is known from outside. Our part is that of `tests.benchmarks.scale`, with
as many trials in flight; what our controller loses is looked at by the crash test.
"""

# pyright: basic

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

from tests.benchmarks import scale

ROOT = Path(__file__).parents[2]
SECONDS = 0.5
"""Of a trial's own work, which takes no processor."""


def objective(config: dict[str, float]) -> None:
    """In an actor: say so, sleep, say so."""
    from ray import tune

    file, name = Path(str(config["file"])), tune.get_context().get_trial_id()
    for event in ("begin", "end"):
        with file.open("a") as lines:
            lines.write(json.dumps({"event": event, "trial": name, "lr": config["lr"]}) + "\n")
        if event == "begin":
            time.sleep(SECONDS)
    tune.report({"value": config["lr"] * config["rank"]})


def drive(folder: Path, trials: int, parallel: int) -> int:
    """In a process of its own: the search, or what a killed one has left of it."""
    import ray
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    ray.init(num_cpus=parallel, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    if tune.Tuner.can_restore(str(folder / "t")):
        tuner = tune.Tuner.restore(str(folder / "t"), trainable=objective)
    else:
        space = {"lr": tune.loguniform(1e-5, 1e-2), "rank": tune.choice([4, 8, 16, 32]), "file": str(folder / "lines")}
        search = OptunaSearch(metric="value", mode="max", seed=0)
        how = tune.TuneConfig(search_alg=search, num_samples=trials, max_concurrent_trials=parallel, reuse_actors=True)
        run = tune.RunConfig(name="t", storage_path=str(folder), verbose=0)
        tuner = tune.Tuner(objective, param_space=space, tune_config=how, run_config=run)
    begin = time.process_time()
    found = tuner.fit()
    spent = time.process_time() - begin
    finished = [result.metrics["trial_id"] for result in found if result.metrics and "value" in result.metrics]
    (folder / "found.json").write_text(json.dumps({"finished": finished, "cpu": spent, "results": len(found)}))
    return 0


def lines(folder: Path) -> list[dict[str, str]]:
    """What the objective wrote."""
    file = folder / "lines"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def start(folder: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "tests.benchmarks.ray_tune", "--driver", str(folder)]
    words += ["--trials", str(options.trials), "--parallel", str(options.parallel)]
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_TMPDIR": str(folder)}
    with (folder / "said.txt").open("ab") as said:
        return subprocess.Popen(words, cwd=ROOT, env={**os.environ, **quiet}, stdout=said, stderr=said)


def tree(folder: Path) -> list[psutil.Process]:
    """The driver, and what Ray started for it."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("RAY_TMPDIR") == str(folder):
                found.append(process)
    return found


def spent(folder: Path, seen: dict[int, float]) -> None:
    """Seconds on a core of each process, as far as it was seen."""
    for process in tree(folder):
        with suppress(psutil.Error):
            times = process.cpu_times()
            seen[process.pid] = times.user + times.system


def say(what: str) -> None:
    print(what, flush=True)


def measure(folder: Path, options: argparse.Namespace) -> None:
    seen: dict[int, float] = {}
    begin = time.monotonic()
    driver = start(folder, options)
    ended: list[str] = []
    while len(ended) < options.trials // 2:
        assert driver.poll() is None, (folder / "said.txt").read_text()[-3000:]
        time.sleep(1)
        spent(folder, seen)
        ended = [line["trial"] for line in lines(folder) if line["event"] == "end"]
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    passed, count = time.monotonic() - begin, len(set(ended))
    say(f"killed after {count} ended trials and {passed:.0f} s; driver {seen[driver.pid]:.1f} s on a core")
    say(f"all of Ray's processes together: {sum(seen.values()):.1f} s on a core")
    time.sleep(30)
    say(f"30 s later {len(tree(folder))} processes of it are alive: {Counter(p.name() for p in tree(folder))}")
    for left in tree(folder):
        left.kill()
    before = lines(folder)
    begin = time.monotonic()
    restored = start(folder, options)
    assert restored.wait() == 0, (folder / "said.txt").read_text()[-3000:]
    after = lines(folder)
    found = json.loads((folder / "found.json").read_text())
    runs = Counter(line["trial"] for line in after if line["event"] == "begin")
    begun, done = ({line["trial"] for line in before if line["event"] == event} for event in ("begin", "end"))
    again = {name for name, count in runs.items() if count > 1}
    say(f"restored: {time.monotonic() - begin:.0f} s; the driver {found['cpu']:.1f} s on a core")
    say(f"{len(found['finished'])} trials of {options.trials} have a result; {sum(runs.values())} runs were begun")
    say(f"run twice: {len(again)}, of which {len(again & done)} had ended before the kill")
    lost = (begun - again) - set(found["finished"])
    say(f"begun before the kill, and in no result: {len(lost)}, of which {len(lost & done)} had ended")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--driver", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.driver:
        return drive(options.driver, options.trials, options.parallel)
    import ray

    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as name:  # short: it holds sockets
        try:
            measure(Path(name), options)
        finally:
            for left in tree(Path(name)):
                left.kill()
    scale.PARALLEL = options.parallel
    with tempfile.TemporaryDirectory() as name:
        ours = scale.run_controlled(scale.study_of(Path(name), None, options.trials))
    say(f"our controller, {options.trials} trials: {ours.per(options.trials)} ms a trial on a core (on the wall)")
    say(f"ray {ray.__version__}; Python {platform.python_version()}; load {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
