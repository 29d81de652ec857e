"""A process that trains what trials share: the tests kill it. TRIAL_FILE RUN_DIR FOLDER CACHE."""

import sys
from pathlib import Path

from orchestrator.spec import TrialSpec
from orchestrator.trained import train_once
from trainers.rundir import RunDir
from trainers.train import build_accelerator


def main() -> None:
    file, run, folder, cache = map(Path, sys.argv[1:])
    spec = TrialSpec.model_validate_json(file.read_text())
    print(train_once(spec, RunDir(run), folder, cache, build_accelerator(spec.train)))


if __name__ == "__main__":
    main()
