# pyright: basic
import json
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.launcher import BusyError, Job, JobId, JobState, Launcher
from orchestrator.launchers.sagemaker import SageMakerLauncher
from orchestrator.s3 import Bucket, Mirror, Stored
from orchestrator.sagemaker_job import _copy, _copy_all
from tests.contracts.launcher import LauncherContract, first_trial, wait_for
from tests.orchestrator.sagemaker import BUCKET, LAUNCHER, refusal, running_s3, stand_in, validate
from trainers.errors import LaunchError
from trainers.rundir import RunDir


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    with running_s3():
        import boto3

        yield boto3.client("s3")


@pytest.fixture
def launcher(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SageMakerLauncher:
    monkeypatch.setattr(SageMakerLauncher, "_client", SageMakerLauncher._client)  # is put back afterwards
    stand_in(tmp_path / "study")
    return build()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return first_trial(tmp_path)


def build(**options: Any) -> SageMakerLauncher:
    built = Launcher.model_validate({**LAUNCHER, **options})
    assert isinstance(built, SageMakerLauncher)
    return built


@pytest.mark.slow
def test_a_trial_runs_as_a_training_job_and_its_files_come_back(
    launcher: SageMakerLauncher, s3: Any, tmp_path: Path, job: Job
):
    """The one that every change runs; the rest of the contract says -m cluster."""
    s3.put_object(Bucket=BUCKET, Key="models/base/unet/config.json", Body=b"{}")
    s3.put_object(Bucket=BUCKET, Key="models/head.safetensors", Body=b"head")
    folder, file = tmp_path / "absent" / "base", tmp_path / "absent" / "head.safetensors"
    channels = {str(folder): f"s3://{BUCKET}/models/base/", str(file): f"s3://{BUCKET}/models/head.safetensors"}
    other_job = tmp_path / "study" / "trials" / "0001"
    (other_job / "adapter").mkdir(parents=True)
    (other_job / "adapter" / "weights").write_text("trained")
    stand_in(tmp_path / "study", hidden=(other_job,))
    whole = build(channels=channels)
    whole.check()
    job_id = whole.submit(replace(job, reads=(other_job,)))
    other = build(channels=channels)
    assert other.submit(job) == other.find(job) == job_id
    wait_for(lambda: other.poll(job_id) is JobState.ENDED)
    run = RunDir(job.run_dir)
    assert run.result.exists(), run.log.read_text()
    assert [event["step"] for _, event in run.read_events()] == list(range(1, 11))
    assert (folder / "unet" / "config.json").read_text() == "{}"  # where the study says, in the container
    assert file.read_text() == "head"
    assert (other_job / "adapter" / "weights").read_text() == "trained"
    assert other.find(job) is None
    other.cancel(job_id)


@pytest.mark.cluster
class TestSageMakerLauncher(LauncherContract):
    @pytest.fixture
    def launcher(self, launcher: SageMakerLauncher) -> SageMakerLauncher:
        return launcher

    @pytest.fixture
    def unknown_id(self, tmp_path: Path) -> JobId:
        return JobId(f"trial-0123456789abcdef-1:{tmp_path}/nowhere")

    def test_a_job_that_was_stopped_goes_on_where_it_was(self, launcher: SageMakerLauncher, job: Job):
        behaviour = job.run_dir.parents[1] / "behaviour.txt"
        behaviour.write_text("slow")
        run = RunDir(job.run_dir)
        first = launcher.submit(job)
        wait_for(lambda: launcher.poll(first) and len(list(run.read_events())) >= 2)
        launcher.cancel(first)
        behaviour.unlink()
        second = launcher.submit(job)
        assert second != first
        wait_for(lambda: launcher.poll(second) is JobState.ENDED)
        steps = [event["step"] for _, event in run.read_events()]
        assert run.result.exists(), run.log.read_text()
        assert sorted(set(steps)) == list(range(1, 11))
        assert len(steps) <= 11  # the one that was cut short


@pytest.mark.usefixtures("s3")
def test_the_service_accepts_the_job(job: Job):
    """Moto's, which ends a job at once without having run it."""
    launcher = build(environment={"NCCL_DEBUG": "INFO"})
    validate("CreateTrainingJob", launcher.request(job, "trial-1"))
    job_id = launcher.submit(job)
    import boto3

    name = job_id.partition(":")[0]
    described = boto3.client("sagemaker").describe_training_job(TrainingJobName=name)
    assert described["EnableManagedSpotTraining"]
    assert described["CheckpointConfig"]["S3Uri"] == f"s3://{BUCKET}/studies/{job.token}/checkpoints"
    assert described["StoppingCondition"] == {"MaxRuntimeInSeconds": 90_000, "MaxWaitTimeInSeconds": 133_200}
    assert launcher.poll(job_id) is JobState.ENDED
    assert launcher.find(job) is None
    assert launcher.submit(job) != job_id  # it was lost


def test_no_variable_of_the_controller_reaches_a_job(monkeypatch: pytest.MonkeyPatch, job: Job):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-7361")
    assert "canary-7361" not in json.dumps(build().request(job, "trial-1"))


def test_a_failure_that_was_mended_does_not_keep_a_job_from_starting(s3: Any, job: Job):
    key = f"studies/{job.token}/run/error.json"
    s3.put_object(Bucket=BUCKET, Key=key, Body=b"{}")
    build().submit(job)
    assert s3.list_objects_v2(Bucket=BUCKET, Prefix=key)["KeyCount"] == 0


@pytest.mark.parametrize(
    ("name", "size", "problem"),
    [
        ("../../evil", 1, r"got the file name '../../evil' from S3"),
        ("large", 2**60, "free bytes; expected the 1,152,9"),
    ],
)
def test_what_must_not_or_cannot_be_written_is_not_downloaded(tmp_path: Path, name: str, size: int, problem: str):
    class Told(Bucket):
        def files(self) -> dict[str, Stored]:
            return {name: Stored(size, "tag")}

    with pytest.raises(LaunchError, match=problem):
        Mirror(Told(None, "s3://trials/"), tmp_path).download()


def test_a_database_that_is_written_to_is_copied_as_a_whole(s3: Any, tmp_path: Path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    with closing(sqlite3.connect(here / "study.db")) as writer:
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("CREATE TABLE trials (number)")
        mirror = Mirror(Bucket(s3, "s3://trials/database/"), here)
        for number in range(2):
            writer.execute("INSERT INTO trials VALUES (?)", (number,))
            writer.commit()
            mirror.upload()
    Mirror(Bucket(s3, "s3://trials/database/"), there).download()
    assert [path.name for path in there.iterdir()] == ["study.db"]
    with closing(sqlite3.connect(there / "study.db")) as reader:
        assert reader.execute("SELECT number FROM trials").fetchall() == [(0,), (1,)]


@pytest.mark.usefixtures("s3")
def test_a_file_of_this_machine_that_no_channel_brings_is_refused(tmp_path: Path):
    (tmp_path / "model").mkdir()
    job = first_trial(tmp_path, backbone={"path": str(tmp_path / "model")})
    with pytest.raises(LaunchError, match=r"launcher.channels: got no channel for .*/model"):
        build().submit(job)


def test_channels_that_the_disk_cannot_hold_or_that_are_empty_are_refused(s3: Any):
    s3.put_object(Bucket=BUCKET, Key="big/shard.tar", Body=bytes(2**20))
    launcher = build(channels={"/shards": f"s3://{BUCKET}/big/"})
    launcher.check()
    with pytest.raises(LaunchError, match=r"launcher.channels./shards: got s3://trials/none/, which holds no file"):
        build(channels={"/shards": f"s3://{BUCKET}/none/"}).check()
    huge = {"shard.tar": type("Huge", (), {"size": 2**40})()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.s3.Bucket.files", lambda _: huge)
        with pytest.raises(LaunchError, match=r"launcher.volume_gib: got 100; expected at least 1229"):
            launcher.check()


def test_a_store_that_is_not_there_is_said_before_a_study_starts(s3: Any):
    with pytest.raises(LaunchError, match=r"launcher: AWS said: .*NoSuchBucket"):
        build(store="s3://nowhere/").check()


def refuse(monkeypatch: pytest.MonkeyPatch, client: Any, times: int, code: str = "SlowDown") -> None:
    """S3 refuses the next so many files."""
    put, left = client.put_object, iter(range(times))

    def answer(**request: Any) -> Any:
        if next(left, None) is not None:
            raise refusal(code, "Please reduce your request rate")
        return put(**request)

    monkeypatch.setattr(client, "put_object", answer)


def test_an_upload_that_s3_is_too_busy_for_is_tried_again(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "result.json").write_text("{}")
    bucket = Bucket(s3, "s3://trials/busy/")
    mirror = Mirror(bucket, tmp_path)
    refuse(monkeypatch, s3, 1)
    assert not _copy(mirror)
    assert "will try again" in capsys.readouterr().err
    refuse(monkeypatch, s3, 2)
    _copy_all(mirror, seconds=0.01)
    assert set(bucket.files()) == {"result.json"}


def test_a_job_whose_last_upload_is_refused_for_good_fails(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from boto3.exceptions import S3UploadFailedError

    (tmp_path / "result.json").write_text("{}")
    refuse(monkeypatch, s3, 100)
    with pytest.raises(S3UploadFailedError, match="SlowDown"):
        _copy_all(Mirror(Bucket(s3, "s3://trials/refused/"), tmp_path), seconds=0.01)


@pytest.mark.parametrize(("code", "kind"), [("SlowDown", BusyError), ("AccessDenied", LaunchError)])
def test_why_an_upload_was_refused_is_said(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, kind: type[LaunchError]
):
    (tmp_path / "trial.yaml").write_text("")
    refuse(monkeypatch, s3, 1, code)
    with pytest.raises(LaunchError, match=rf"launcher: AWS said: .*{code}.*; expected it to accept") as caught:
        build()._ask(lambda: Bucket(s3, "s3://trials/busy/").upload(tmp_path / "trial.yaml", "trial.yaml"))
    assert type(caught.value) is kind


def test_without_boto3_the_study_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(LaunchError, match=r"pip install 'diffusion-tuning\[sagemaker\]'"):
        build().check()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"channels": {"models": "s3://trials/models/"}}, "from / on"),
        ({"store": "s3://trials/studies"}, "should match pattern"),
        ({"timeout_minutes": 50_000}, "at most 28 days"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], problem: str):
    with pytest.raises(ValidationError, match=problem):
        build(**options)
