"""A stand-in for SageMaker's service over moto's S3: jobs are the real entry point, in folders like a container's.

Its state is on disk, so that controllers may come and go. What it is asked for is checked against botocore's model.
"""

# pyright: basic

import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.launcher import TOKEN
from orchestrator.launchers.sagemaker import SageMakerLauncher

ROOT = Path(__file__).parents[2]
BUCKET = "trials"
STOP_SECONDS = 5
"""Between asking a job to end and killing it; the service waits for 120."""
LAUNCHER = {
    "kind": "sagemaker",
    "role": "arn:aws:iam::123456789012:role/training",
    "image": "123456789012.dkr.ecr.us-east-1.amazonaws.com/tuning:1",
    "instance": "ml.g5.xlarge",
    "store": f"s3://{BUCKET}/studies/",
    "spot": True,
    "poll_seconds": 0.2,
}


class Service:
    """Client of the part of SageMaker that launchers use; a container for each job below `folder`."""

    def __init__(self, folder: Path, s3: Any, hidden: tuple[Path, ...]) -> None:
        self.folder, self.s3, self.hidden = folder, s3, hidden

    def create_training_job(self, **request: Any) -> None:
        validate("CreateTrainingJob", request)
        root = self.folder / request["TrainingJobName"]
        if root.exists():
            raise refusal("ResourceInUse", "Training job names must be unique within an AWS account and region")
        (root / "input" / "data").mkdir(parents=True)
        for path in self.hidden:
            path.rename(path.with_name(f"{path.name}.here"))
        for channel in request.get("InputDataConfig", []):
            uri = channel["DataSource"]["S3DataSource"]["S3Uri"]
            self.copy_down(uri, root / "input" / "data" / channel["ChannelName"])
        checkpoints = request["CheckpointConfig"]["S3Uri"]
        (root / "checkpoints").mkdir()
        self.copy_down(f"{checkpoints}/", root / "checkpoints")
        (root / "checkpoints.txt").write_text(checkpoints)
        (root / "token.txt").write_text(request["Environment"][TOKEN])
        algorithm = request["AlgorithmSpecification"]
        words = [sys.executable, *algorithm["ContainerEntrypoint"][1:], *algorithm["ContainerArguments"]]
        words += ["--root", str(root), "--sync-seconds", "0.2"]
        aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **aws, **request["Environment"]}
        job = f"{shlex.join(words)} >{root}/said.txt 2>&1 & echo $! >{root}/pid.txt; wait $!; echo $? >{root}/exit.txt"
        detached = ["sh", "-c", f"( {job} ) >/dev/null 2>&1 </dev/null &"]
        subprocess.run(detached, check=True, env=environment, start_new_session=True)
        while not (root / "pid.txt").exists():
            time.sleep(0.01)

    def describe_training_job(self, TrainingJobName: str) -> dict[str, Any]:  # noqa: N803
        root = self.folder / TrainingJobName
        if not root.exists():
            raise refusal("ValidationException", "Requested resource not found.")
        if not (root / "exit.txt").exists():
            stopping = (root / "stopping.txt").exists()
            if stopping and time.time() - (root / "stopping.txt").stat().st_mtime > STOP_SECONDS:
                self.kill(root)
            return {
                "TrainingJobStatus": "Stopping" if stopping else "InProgress",
                "SecondaryStatus": "Stopping" if stopping else "Training",
            }
        self.copy_up(root / "checkpoints", (root / "checkpoints.txt").read_text())
        ended = "Completed" if (root / "exit.txt").read_text().strip() == "0" else "Failed"
        status = "Stopped" if (root / "stopping.txt").exists() else ended
        return {"TrainingJobStatus": status, "SecondaryStatus": status}

    def stop_training_job(self, TrainingJobName: str) -> None:  # noqa: N803
        root = self.folder / TrainingJobName
        (root / "stopping.txt").touch()
        with suppress(psutil.NoSuchProcess):
            psutil.Process(int((root / "pid.txt").read_text())).terminate()

    def kill(self, root: Path) -> None:
        """What a container's end does to its processes."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(TOKEN) == (root / "token.txt").read_text() and process.name() != "sh":
                    process.kill()

    def copy_down(self, uri: str, folder: Path) -> None:
        prefix = uri.removeprefix(f"s3://{BUCKET}/")
        for item in self.s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", []):
            name = item["Key"].removeprefix(prefix) or Path(prefix).name
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            self.s3.download_file(BUCKET, item["Key"], str(folder / name))

    def copy_up(self, folder: Path, uri: str) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                key = f"{uri.removeprefix(f's3://{BUCKET}/')}/{path.relative_to(folder).as_posix()}"
                self.s3.upload_file(str(path), BUCKET, key)


def validate(operation: str, request: dict[str, Any]) -> None:
    """What the real service would say of the request's form."""
    import botocore.session
    from botocore.validate import ParamValidator

    shape = botocore.session.get_session().get_service_model("sagemaker").operation_model(operation).input_shape
    report = ParamValidator().validate(request, shape)
    assert not report.has_errors(), report.generate_report()


def refusal(code: str, message: str) -> Exception:
    from botocore.exceptions import ClientError

    return ClientError({"Error": {"Code": code, "Message": message}}, "SageMaker")


@contextmanager
def running_s3() -> Generator[None]:
    """Moto's S3 and SageMaker by HTTP, named by the environment; skips where it is not installed."""
    pytest.importorskip("moto", reason="needs moto: pip install 'moto[s3,sagemaker]'")
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        with pytest.MonkeyPatch.context() as patch:
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
                patch.setenv(name, "testing")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield
    finally:
        server.stop()


def stand_in(folder: Path, hidden: tuple[Path, ...] = ()) -> None:
    """From now on launchers of this process talk to a `Service`; containers do not see what is `hidden`."""
    import boto3

    real = SageMakerLauncher._client

    def client(self: SageMakerLauncher, service: str) -> Any:
        return Service(folder, boto3.client("s3"), hidden) if service == "sagemaker" else real(self, service)

    SageMakerLauncher._client = client
