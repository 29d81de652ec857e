"""What a SageMaker job runs: brings a trial's folder from S3, runs torchrun in it, and copies what it writes to S3.

The platform gives `/opt/ml`: `input/data` holds the channels, and `checkpoints` what S3 held of an earlier attempt,
which it copies back by itself. Models and pictures are found where the study says because links there lead to channels.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import boto3
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError

from orchestrator.s3 import Bucket, Mirror
from trainers.errors import LaunchError
from trainers.rundir import RunDir, RunError

ORDER = "job.json"
"""What to run, beside the trial's folder in S3."""
RUN = "{run}"
"""Stands for the trial's folder, which has another path here, among the arguments."""
_OURS_ALONE = frozenset(("lock", "cache"))
"""What is not copied; neither are the trial's own checkpoints, which the platform copies."""
_LAST_COPIES = 5
"""Attempts to copy what a job that has ended leaves."""
_SHUTDOWN_SECONDS = 100
"""For ranks to write a checkpoint; the platform kills 120 s after it asked a job to end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trial at `uri`; torchrun's exit code."""
    parser = argparse.ArgumentParser(prog="orchestrator.sagemaker_job", description=__doc__)
    parser.add_argument("uri", help="s3://bucket/folder/ of the trial")
    parser.add_argument("--root", type=Path, default=Path("/opt/ml"), help="the platform's folder")
    parser.add_argument("--sync-seconds", type=float, default=20.0, help="how often what is new is copied to S3")
    options = parser.parse_args(argv)
    run = RunDir(options.root / "run")
    run.path.mkdir(parents=True, exist_ok=True)
    client = cast("Any", boto3.client("s3"))
    bucket = Bucket(client, options.uri)
    mirror = Mirror(Bucket(client, f"{options.uri}run/"), run.path, _OURS_ALONE)
    try:
        order = json.loads(bucket.read(ORDER))
        mirror.download()
        for name in set(order["folders"].values()):
            (options.root / name).mkdir(parents=True, exist_ok=True)
            Mirror(Bucket(client, f"{options.uri}{name}/"), options.root / name).download()
        _link(order, options.root)
        code = _run(order, run, mirror, options.sync_seconds)
    except LaunchError as error:
        run.write(run.error, RunError(reason="config", message=str(error)))
        code = 1
    _copy_all(mirror, options.sync_seconds)
    if code:
        _say(options.root / "output" / "failure", f"exit code {code}; see {options.uri}run/log.txt")
    return code


def _link(order: Mapping[str, Any], root: Path) -> None:
    """Let every path that the study names lead to what was downloaded."""
    (root / "checkpoints").mkdir(exist_ok=True)
    wanted = {root / "run" / "checkpoints": root / "checkpoints"}
    wanted |= {Path(path): root / "input" / "data" / channel for path, channel in order["channels"].items()}
    wanted |= {Path(path): root / name for path, name in order["folders"].items()}
    own = Path(order["run_dir"])
    wanted |= {} if own.exists() else {own: root / "run"}
    for path, target in wanted.items():
        if path.is_symlink() and path.readlink() == target:
            continue
        if not target.exists():
            raise LaunchError(f"{path}: got no {target}; expected the platform to bring it as a channel")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(target)
        except OSError as error:
            raise LaunchError(
                f"{path}: got {error}; expected to be able to link it to {target}: a path that the image does not "
                "have, and a user who may write there"
            ) from error


def _run(order: Mapping[str, Any], run: RunDir, mirror: Mirror, seconds: float) -> int:
    """Torchrun, with what it writes copied all the while."""
    arguments = [argument.replace(RUN, str(run.path)) for argument in order["arguments"]]
    torchrun = ("torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
    ranks = ("--nproc-per-node", str(order["num_processes"]), "--shutdown-timeout", str(_SHUTDOWN_SECONDS))
    words = [sys.executable, "-m", *torchrun, *ranks, "-m", order["module"], *arguments]
    with run.log.open("ab") as log:
        job = subprocess.Popen(words, cwd=run.path, stdout=log, stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"})  # noqa: S603
        signal.signal(signal.SIGTERM, lambda _signal, _frame: job.terminate())
        while True:
            try:
                return job.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                _copy(mirror)


def _copy_all(mirror: Mirror, seconds: float) -> None:
    """Copy what a job leaves; an error of the last attempt is the job's."""
    for _ in range(_LAST_COPIES - 1):
        if _copy(mirror):
            return
        time.sleep(seconds)
    mirror.upload()


def _copy(mirror: Mirror) -> bool:
    """Copy now what can be copied, and say whether that was all; what cannot is tried again."""
    try:
        mirror.upload()
    except (Boto3Error, BotoCoreError, ClientError, OSError) as error:
        print(f"could not copy to S3, will try again: {error}", file=sys.stderr)  # noqa: T201  the platform's log
        return False
    return True


def _say(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
