"""Amazon SageMaker: a trial is a training job; a folder in S3 stands for the disk that other clusters share.

Spoken to by boto3, because a job must have the name that follows from its run directory: the service refuses a name
that it has seen, so nothing is ever submitted twice. The job is `orchestrator.sagemaker_job` in the user's image.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, cast

import yaml
from pydantic import AfterValidator, Field, PrivateAttr, StringConstraints, model_validator
from typing_extensions import override

from orchestrator.launcher import TOKEN, BusyError, Job, JobId, JobState, Launcher, patiently
from orchestrator.s3 import Bucket, Mirror
from trainers.errors import LaunchError

T = TypeVar("T")

_MODULE, _ORDER, _RUN = "orchestrator.sagemaker_job", "job.json", "{run}"
_WORKING = frozenset(("Training", "Uploading", "Stopping"))
"""What a job that is in progress does once its container runs; before, it waits for a machine, data or an image."""
_LIVE = frozenset(("InProgress", "Stopping"))
_UNKNOWN = ("not found", "could not find", "does not exist")
_BUSY = frozenset(
    ("ThrottlingException", "Throttling", "ServiceUnavailable", "InternalFailure", "InternalServerError", "SlowDown")
) | {"InternalError", "500", "503"}  # S3's; numbers are all that it says to HEAD
_NOT_SENT = frozenset(("checkpoints", "lock", "samples", "snapshots", "runs"))
"""Of a run directory: the platform keeps the first, and jobs need none of the others."""
_NOT_RECEIVED = frozenset(("checkpoints",))
"""What only another job needs."""
_MAX_SECONDS = 28 * 24 * 3600
"""The service's own bound on a job."""
_CANCEL_SECONDS = 600.0
_ROOM = 1.2
"""Of a volume, over what the channels hold: checkpoints, samples and the adapter."""


def _are_absolute(channels: dict[str, str]) -> dict[str, str]:
    for path in channels:
        if not path.startswith("/") or path.endswith("/"):
            raise ValueError(
                f"got {path!r}; expected a path as the study's trials name it, from / on, without / at its end"
            )
    return channels


S3Uri = Annotated[str, StringConstraints(pattern=r"^s3://[a-z0-9][a-z0-9.-]+/.")]


class SageMakerLauncher(Launcher):
    """Submits each trial as a SageMaker training job on one instance."""

    kind: Literal["sagemaker"] = "sagemaker"
    role: Annotated[str, StringConstraints(pattern=r"^arn:aws[a-z-]*:iam::")]
    """What the jobs may do: read the channels, read and write `store`."""
    image: str = Field(min_length=1)
    """A container image with the project and its packages."""
    instance: Annotated[str, StringConstraints(pattern=r"^ml\.")]
    """Type of the machine, as in ml.g5.12xlarge."""
    store: Annotated[str, StringConstraints(pattern=r"^s3://[a-z0-9][a-z0-9.-]+/(.*/)?$")]
    """Folder where jobs and this machine meet, as in `s3://bucket/studies/`."""
    channels: Annotated[dict[str, S3Uri], AfterValidator(_are_absolute)] = Field(default={})
    """What trials read: its path in the study to where it lies in S3, which ends with / if it is a folder."""
    region: str | None = None
    """null is that of AWS's own configuration."""
    volume_gib: int = Field(default=100, ge=1)
    """Disk of the machine."""
    spot: bool = False
    """Cheaper machines that may be taken away; a trial then goes on from its checkpoint on another."""
    spot_wait_minutes: float = Field(default=12 * 60, gt=0)
    """How long a job may wait for such machines, in all."""
    environment: dict[str, str] = Field(default={})
    """Variables of the jobs, which inherit none: `{NCCL_DEBUG: INFO}`."""
    poll_seconds: float = Field(default=30.0, gt=0)
    """How often the controller looks at its jobs."""
    patience_minutes: float = Field(default=30, ge=0)
    """How long AWS may not answer before the study ends with an error; its jobs go on meanwhile."""

    _clients: dict[str, Any] = PrivateAttr(default_factory=dict[str, Any])
    _mirrors: dict[JobId, Mirror] = PrivateAttr(default_factory=dict[JobId, Mirror])

    @model_validator(mode="after")
    def _ends_in_time(self) -> Self:
        if self.timeout_minutes * 60 > _MAX_SECONDS:
            raise ValueError(
                f"got timeout_minutes {self.timeout_minutes}; expected at most 28 days, {_MAX_SECONDS // 60}"
            )
        return self

    @override
    def check(self) -> None:
        held = 0
        for path, uri in self.channels.items():
            files = self._ask(Bucket(self._client("s3"), uri).files)
            if not files:
                raise LaunchError(f"launcher.channels.{path}: got {uri}, which holds no file; expected one at least")
            held += sum(file.size for file in files.values())
        if held * _ROOM > self.volume_gib * 2**30:
            raise LaunchError(
                f"launcher.volume_gib: got {self.volume_gib}; expected at least {held * _ROOM / 2**30:.0f}, because "
                f"the channels hold {held / 2**30:.1f} GiB"
            )
        self._ask(lambda: Bucket(self._client("s3"), self.store).write("writable", ""))

    @override
    def submit(self, job: Job) -> JobId:
        return self._patiently(lambda: self._submit(job))

    @override
    def find(self, job: Job) -> JobId | None:
        return self._patiently(lambda: self._find(job)[0])

    @override
    def poll(self, job_id: JobId) -> JobState:
        state = self._patiently(lambda: self._state(job_id))  # first: what it wrote is then complete
        if state is not JobState.QUEUED:
            self._patiently(lambda: self._receive(job_id))
        return state

    @override
    def cancel(self, job_id: JobId) -> None:
        name, deadline = job_id.partition(":")[0], time.monotonic() + _CANCEL_SECONDS
        if self._patiently(lambda: self._status(name)) == "InProgress":
            self._patiently(lambda: self._stop(name))
        while self._patiently(lambda: self._state(job_id)) is not JobState.ENDED:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"launcher: got job {name} that did not end in {_CANCEL_SECONDS / 60:.0f} minutes; expected "
                    f"`aws sagemaker stop-training-job --training-job-name {name}` to end it"
                )
            time.sleep(min(self.poll_seconds, 5.0))
        self._patiently(lambda: self._receive(job_id))

    def request(self, job: Job, name: str) -> dict[str, Any]:
        """What the service is asked for."""
        seconds = min(_MAX_SECONDS, int(self.timeout_minutes * 60) + 3600)  # the controller is the first to end a job
        stopping = {"MaxRuntimeInSeconds": seconds}
        if self.spot:
            stopping["MaxWaitTimeInSeconds"] = seconds + int(self.spot_wait_minutes * 60)
        home = self._home(job)
        channels = [
            {
                "ChannelName": channel,
                "InputMode": "File",
                "DataSource": {
                    "S3DataSource": {
                        "S3DataType": "S3Prefix",
                        "S3Uri": self.channels[path],
                        "S3DataDistributionType": "FullyReplicated",
                    }
                },
            }
            for path, channel in self._channel_names().items()
        ]
        return {
            "TrainingJobName": name,
            "RoleArn": self.role,
            "AlgorithmSpecification": {
                "TrainingImage": self.image,
                "TrainingInputMode": "File",
                "ContainerEntrypoint": ["python", "-m", _MODULE],
                "ContainerArguments": [home],
            },
            **({"InputDataConfig": channels} if channels else {}),
            "OutputDataConfig": {"S3OutputPath": f"{home}output"},
            "ResourceConfig": {"InstanceType": self.instance, "InstanceCount": 1, "VolumeSizeInGB": self.volume_gib},
            "StoppingCondition": stopping,
            "EnableManagedSpotTraining": self.spot,
            "CheckpointConfig": {"S3Uri": f"{home}checkpoints", "LocalPath": "/opt/ml/checkpoints"},
            "Environment": {**self.environment, TOKEN: job.token},
        }

    def _submit(self, job: Job) -> JobId:
        live, number = self._find(job)
        if live:
            return live
        self._check_paths(job)
        bucket = Bucket(self._client("s3"), self._home(job))
        for path in job.run_dir.glob("*.yaml"):
            bucket.upload(path, f"run/{path.name}")
        Mirror(Bucket(self._client("s3"), f"{self._home(job)}run/"), job.run_dir, _NOT_SENT).give()
        for name, folder in self._folders(job).items():
            Mirror(Bucket(self._client("s3"), f"{self._home(job)}{name}/"), folder, _NOT_SENT).give()
        if not (job.run_dir / "error.json").exists():  # somebody has mended its cause
            bucket.remove("run/error.json")
        bucket.write(_ORDER, json.dumps(self._order(job), indent=2))
        name = f"trial-{job.token}-{number}"
        self._client("sagemaker").create_training_job(**self.request(job, name))
        return JobId(f"{name}:{job.run_dir}")

    def _order(self, job: Job) -> dict[str, Any]:
        """What the job reads first."""
        channels = {
            path: channel if self.channels[path].endswith("/") else f"{channel}/{Path(self.channels[path]).name}"
            for path, channel in self._channel_names().items()
        }
        return {
            "module": job.module,
            "arguments": [argument.replace(str(job.run_dir), _RUN) for argument in job.arguments],
            "num_processes": self.num_processes,
            "run_dir": str(job.run_dir),
            "channels": channels,
            "folders": {str(folder): name for name, folder in self._folders(job).items()},
        }

    def _folders(self, job: Job) -> dict[str, Path]:
        """What other jobs wrote and this one reads, by its place beside the job's own folder."""
        return {f"reads/{index}": folder for index, folder in enumerate(sorted(job.reads)) if folder.is_dir()}

    def _channel_names(self) -> dict[str, str]:
        return {path: f"channel{index}" for index, path in enumerate(sorted(self.channels))}

    def _check_paths(self, job: Job) -> None:
        """Everything that the trial names on this machine must be brought to the job's."""
        trees = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in job.run_dir.glob("*.yaml")]
        brought = (*map(Path, self.channels), *job.reads)
        for path in map(Path, _texts(trees)):
            is_here = path.is_absolute() and path.exists() and not job.run_dir.is_relative_to(path)
            if is_here and not any(path.is_relative_to(known) for known in brought):
                raise LaunchError(
                    f"launcher.channels: got no channel for {path}, which the trial names; expected "
                    f"`{path}: s3://...`, because jobs see none of this machine's files"
                )

    def _home(self, job: Job) -> str:
        return f"{self.store}{job.token}/"

    def _find(self, job: Job) -> tuple[JobId | None, int]:
        """The job that is live, and the number that the next one would have."""
        number = 1
        while status := self._status(f"trial-{job.token}-{number}"):
            if status in _LIVE:
                return JobId(f"trial-{job.token}-{number}:{job.run_dir}"), number
            number += 1
        return None, number

    def _state(self, job_id: JobId) -> JobState:
        described = self._describe(job_id.partition(":")[0])
        if described is None or described["TrainingJobStatus"] not in _LIVE:
            return JobState.ENDED
        return JobState.RUNNING if described["SecondaryStatus"] in _WORKING else JobState.QUEUED

    def _status(self, name: str) -> str | None:
        described = self._describe(name)
        return described["TrainingJobStatus"] if described else None

    def _describe(self, name: str) -> dict[str, Any] | None:
        from botocore.exceptions import ClientError

        try:
            return self._client("sagemaker").describe_training_job(TrainingJobName=name)
        except ClientError as error:
            if any(words in str(error).lower() for words in _UNKNOWN):
                return None
            raise

    def _stop(self, name: str) -> None:
        if self._status(name) == "InProgress":
            self._client("sagemaker").stop_training_job(TrainingJobName=name)

    def _receive(self, job_id: JobId) -> None:
        """Copy what the job wrote into its run directory."""
        name, _, folder = job_id.partition(":")
        if not Path(folder).is_dir():  # an id that this study never had
            return
        if job_id not in self._mirrors:
            token = name.removeprefix("trial-").rpartition("-")[0]
            bucket = Bucket(self._client("s3"), f"{self.store}{token}/run/")
            self._mirrors[job_id] = Mirror(bucket, Path(folder), _NOT_RECEIVED)
        self._mirrors[job_id].download()

    def _client(self, service: str) -> Any:
        if service not in self._clients:
            try:
                import boto3
                from botocore.config import Config
            except ImportError as error:
                raise LaunchError(
                    f"launcher: got {error}; expected boto3: pip install 'diffusion-tuning[sagemaker]'"
                ) from error
            retries = Config(retries={"mode": "adaptive", "max_attempts": 10})
            session: Any = boto3.Session(region_name=self.region)
            self._clients[service] = session.client(service, config=retries)
        return self._clients[service]

    def _patiently(self, ask: Callable[[], T]) -> T:
        return patiently(
            lambda: self._ask(ask), minutes=self.patience_minutes, pause_seconds=max(self.poll_seconds, 1.0)
        )

    def _ask(self, ask: Callable[[], T]) -> T:
        """What AWS answers; its errors in our words."""
        self._client("s3")  # says what is missing without boto3
        from boto3.exceptions import RetriesExceededError, S3UploadFailedError
        from botocore import exceptions

        try:
            return ask()
        except (exceptions.ConnectionError, exceptions.HTTPClientError, RetriesExceededError) as error:
            raise BusyError(f"launcher: got {error}; expected AWS to answer") from error
        except (exceptions.ClientError, S3UploadFailedError) as error:
            refusal = error if isinstance(error, exceptions.ClientError) else error.__context__  # which boto3 wraps
            is_busy = isinstance(refusal, exceptions.ClientError) and refusal.response["Error"]["Code"] in _BUSY
            kind = BusyError if is_busy else LaunchError
            raise kind(f"launcher: AWS said: {error}; expected it to accept the request") from error
        except exceptions.BotoCoreError as error:
            raise LaunchError(f"launcher: got {error}; expected AWS's region and credentials to be set up") from error


def _texts(tree: object) -> Iterator[str]:
    """All texts of nested mappings and lists."""
    if isinstance(tree, dict):
        tree = list(cast("dict[str, object]", tree).values())
    if isinstance(tree, list):
        for part in cast("list[object]", tree):
            yield from _texts(part)
    elif isinstance(tree, str):
        yield tree
