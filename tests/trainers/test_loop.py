# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from orchestrator.launcher import rendezvous
from tests.contracts.method import InterruptionError, interrupt, load_state, losses, weights
from trainers.batch import Stream, example_rng
from trainers.data.folder import FolderConfig
from trainers.errors import CheckpointError, ConfigError, NonFiniteError
from trainers.loop import fit, split_batch
from trainers.rundir import RunDir
from trainers.train import train


def events(run, kind="train"):
    return [event for _, event in run.read_events() if event["event"] == kind]


def test_an_event_is_not_lost_after_one_that_a_kill_cut_short(tmp_path):
    run = RunDir(tmp_path)
    run.append("train", step=1)
    with run.events.open("a") as file:
        file.write('{"time": 1, "event": "tra')
    for step in (2, 3):
        run.append("train", step=step)
    assert [event["step"] for event in events(run)] == [1, 2, 3]
    assert run.events.read_text().count("\n") == 4


def pick(seed, count, position):
    """What a folder of `count` pictures shows at `position`."""
    return FolderConfig(path="/", resolution=64).pick([None] * count, seed, 0, position, 1)


def test_every_epoch_shows_every_example_once():
    shown = [pick(0, 7, position) for position in range(21)]
    assert Counter(shown) == dict.fromkeys(range(7), 3)
    assert len({tuple(shown[i : i + 7]) for i in (0, 7, 14)}) == 3


def test_the_order_depends_on_the_seed():
    assert [pick(0, 30, p) for p in range(30)] != [pick(1, 30, p) for p in range(30)]


@pytest.mark.parametrize(("batch", "micro", "world"), [(4, None, 1), (7, 2, 3), (5, 1, 2), (8, 3, 2)])
def test_processes_and_micro_batches_cover_the_batch_exactly_once(make_config, batch, micro, world):
    config = make_config(batch_size=batch, micro_batch_size=micro)
    parts = [places for rank in range(world) for places in split_batch(config, rank, world)]
    assert [place for places in parts for place in places] == list(range(batch))
    assert max(map(len, parts)) <= (micro or batch)


def test_random_streams_are_distinct_and_repeatable():
    keys = [(seed, step, place, stream) for seed in (0, 1) for step in (0, 1) for place in (0, 1) for stream in Stream]
    drawn = [float(torch.rand((), generator=example_rng(*key))) for key in keys]
    assert len(set(drawn)) == len(keys)
    assert drawn == [float(torch.rand((), generator=example_rng(*key))) for key in keys]


def test_the_logged_loss_is_the_mean_over_the_batches_since_the_last_line(make_config, accelerator, tmp_path):
    config = make_config(log_every=3, steps=7, micro_batch_size=3)
    method = config.build(0, None, accelerator)
    seen = []
    losses = method.losses

    def spy(batch):
        values = losses(batch)
        seen.append((batch.step, values.detach().sum()))
        return values

    method.losses = spy
    run = RunDir(tmp_path / "run")
    fit(method, config, run, accelerator)
    logged = events(run)
    assert [event["step"] for event in logged] == [3, 6, 7]
    for event, steps in zip(logged, [(0, 1, 2), (3, 4, 5), (6,)], strict=True):
        expected = sum(float(value) for step, value in seen if step in steps) / 4 / len(steps)
        assert event["loss"] == pytest.approx(expected, rel=1e-5)
        assert event["grad_norm"] > 0
        assert event["images_per_second"] > 0
        assert event["peak_bytes"] > 1 << 20


def test_the_learning_rate_follows_the_schedule(make_config, accelerator, tmp_path):
    config = make_config(schedule={"kind": "cosine", "warmup_steps": 2}, log_every=1)
    run = RunDir(tmp_path / "run")
    fit(config.build(0, None, accelerator), config, run, accelerator)
    assert [event["lr"] for event in events(run)] == [1e-2 * config.schedule.factor(step, 6) for step in range(6)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step(make_config, accelerator, tmp_path, bad):
    config = make_config()
    method = config.build(0, None, accelerator)
    losses = method.losses
    before = {}

    def poisoned(batch):
        values = losses(batch)
        if batch.step < 3:
            return values
        before.update(weights(method))
        return values * bad

    method.losses = poisoned
    with pytest.raises(NonFiniteError, match=r"step 3: gradient norm is (nan|inf)"):
        fit(method, config, RunDir(tmp_path / "run"), accelerator)
    assert all(torch.equal(value, before[name]) for name, value in weights(method).items())


def test_gradients_are_clipped(make_config, accelerator, tmp_path):
    # With one step of Adam the update does not show the norm, so look at Adam's first moment.
    config = make_config(steps=1, max_grad_norm=1e-3)
    run = RunDir(tmp_path / "run")
    fit(config.build(0, None, accelerator), config, run, accelerator)
    moments = [state["exp_avg"] for state in load_state(run)["optimizer"]["state"].values()]
    norm = torch.cat([moment.flatten() for moment in moments]).norm() / 0.1
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    assert events(run)[0]["grad_norm"] > 1e-3


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_run_goes_on_from_its_newest_checkpoint_or_from_the_start(make_config, accelerator, tmp_path, step):
    config = make_config(text_encoder_lora={"rank": 2})
    whole, run = config.build(0, None, accelerator), RunDir(tmp_path / "whole")
    fit(whole, config, run, accelerator)
    broken, halves = config.build(0, None, accelerator), RunDir(tmp_path / "halves")
    interrupt(broken, step)
    with pytest.raises(InterruptionError):
        fit(broken, config, halves, accelerator)
    resumed = config.build(0, None, accelerator)
    fit(resumed, config, halves, accelerator)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
    assert losses(halves) == losses(run)


def test_a_corrupt_newest_checkpoint_costs_steps_but_not_the_result(make_config, accelerator, tmp_path):
    config = make_config()
    whole = config.build(0, None, accelerator)
    fit(whole, config, RunDir(tmp_path / "whole"), accelerator)
    run, broken = RunDir(tmp_path / "run"), config.build(0, None, accelerator)
    interrupt(broken, 5)
    with pytest.raises(InterruptionError):
        fit(broken, config, run, accelerator)
    (run.checkpoints / "step-0000004.pt").write_bytes(b"rubbish")
    resumed = config.build(0, None, accelerator)
    fit(resumed, config, run, accelerator)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


def test_a_finished_run_trains_no_further(make_config, accelerator, tmp_path):
    config, run = make_config(), RunDir(tmp_path / "run")
    first = config.build(0, None, accelerator)
    fit(first, config, run, accelerator)
    again = config.build(0, None, accelerator)
    again.losses = None
    fit(again, config, run, accelerator)
    expected = weights(first)
    assert all(torch.equal(value, expected[name]) for name, value in weights(again).items())


def test_a_checkpoint_of_other_weights_is_refused(make_config, accelerator, tmp_path):
    run, config = RunDir(tmp_path / "run"), make_config()
    fit(config.build(0, None, accelerator), config, run, accelerator)
    other = make_config(text_encoder_lora={"rank": 2})
    with pytest.raises(CheckpointError, match="other weights"):
        fit(other.build(0, None, accelerator), other, run, accelerator)


def test_training_leaves_the_networks_in_evaluation_mode(make_config, accelerator, tmp_path):
    config = make_config(text_encoder_lora={"rank": 2})
    method = config.build(0, None, accelerator)
    fit(method, config, RunDir(tmp_path / "run"), accelerator)
    assert not any(trained.network.training for trained in method.trained().values())


def test_what_steps_do_not_call_upon_rests_from_the_first_and_after_every_look(make_config, accelerator, tmp_path):
    samples = {"every": 4, "prompts": ["a zog"], "resolution": 64, "steps": 1}
    config = make_config(text_encoder_lora={"rank": 2}, samples=samples)
    method = config.build(0, None, accelerator)
    rested, losses = [], method.losses
    method.backbone.rest = lambda busy: rested.append((step[0], busy))
    step = [None]

    def noting(batch):
        step[0] = batch.step
        return losses(batch)

    method.losses = noting
    fit(method, config, RunDir(tmp_path / "run"), accelerator)
    assert [when for when, _ in rested] == [None, 3, 5]
    assert {id(network) for _, busy in rested for network in busy} == set(map(id, method.backbone.networks.values()))


def test_train_reports_its_stages_and_exports_the_adapter(make_config, accelerator, tmp_path):
    run = RunDir(tmp_path / "run")
    result = train(make_config(), run, 0, tmp_path / "cache", accelerator)
    stages = [(event["stage"], event["state"]) for event in events(run, "stage")]
    assert stages == [("load", "start"), ("load", "end"), ("train", "start"), ("train", "end")]
    assert events(run, "data")[0].items() >= {"train": 6, "held_out": 0, "unreadable": []}.items()
    assert result.seconds.keys() == {"load", "train"}
    assert (run.adapter / "pytorch_lora_weights.safetensors").is_file()


def test_the_loss_falls_on_pictures_seen_often(make_config, accelerator, tmp_path):
    config = make_config(steps=60, log_every=20, checkpoint_every=60, caption_dropout=0.0)
    run = RunDir(tmp_path / "run")
    fit(config.build(0, None, accelerator), config, run, accelerator)
    logged = [event["loss"] for event in events(run)]
    assert logged[-1] < logged[0]


@pytest.fixture
def scaling():
    """What accelerate sets up for float16 on an accelerator, on the CPU: a scale at which the first step overflows."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def build():
        accelerator = Accelerator(cpu=True, mixed_precision="fp16")
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-112)
        return accelerator

    yield build
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_step_that_overflows_in_float16_is_skipped_and_the_scale_outlives_an_interruption(
    make_config, scaling, tmp_path, caplog
):
    config = make_config(precision="fp16", log_every=1)
    accelerator, run = scaling(), RunDir(tmp_path / "run")
    whole = config.build(0, None, accelerator)
    fit(whole, config, run, accelerator)
    assert [record.getMessage()[:7] for record in caplog.records if "overflow" in record.message] == ["step 0:"]
    assert accelerator.scaler.get_scale() == 2.0**14
    assert {value.dtype for value in weights(whole).values()} == {torch.float32}
    halves, broken = RunDir(tmp_path / "halves"), config.build(0, None, accelerator)
    interrupt(broken, 3)
    with pytest.raises(InterruptionError):
        fit(broken, config, halves, scaling())
    resumed = config.build(0, None, accelerator)
    fit(resumed, config, halves, scaling())
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


def test_float16_is_refused_where_nothing_scales_its_gradients(make_config, accelerator, tmp_path):
    config = make_config(precision="fp16")
    with pytest.raises(ConfigError, match=r"train\.precision is fp16.* this is a cpu; set it to bf16 or fp32"):
        fit(config.build(0, None, accelerator), config, RunDir(tmp_path / "run"), accelerator)


WORKER = """
import json, sys
from pathlib import Path
import trainers.methods
from trainers.method import MethodConfig
from trainers.rundir import RunDir
from trainers.train import build_accelerator, train
config = MethodConfig.model_validate(json.loads(Path(sys.argv[1]).read_text()))
accelerator = build_accelerator(config)
train(config, RunDir(Path(sys.argv[2])), 0, Path(sys.argv[3]), accelerator)
accelerator.end_training()
"""


@pytest.fixture
def launch(tmp_path):
    """Starts a training process group on its own files."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def start(config, run, processes=1, meeting=()):
        frozen = tmp_path / f"{run.path.name}.json"
        frozen.write_text(json.dumps(config.model_dump(mode="json")))
        launcher = ["-m", "torch.distributed.run", *(meeting or ["--standalone"]), f"--nproc-per-node={processes}"]
        job = [*(launcher if processes > 1 or meeting else []), script, frozen, run.path, tmp_path / "cache"]
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen([sys.executable, *map(str, job)], env=environment)

    return start


@pytest.mark.slow
def test_two_nodes_train_what_two_processes_of_one_do(make_config, launch, tmp_path):
    """Two torchruns that meet at a port of this machine, as they would on two."""
    config = make_config()
    one, two = RunDir(tmp_path / "one"), RunDir(tmp_path / "two")
    assert launch(config, one, 2).wait(timeout=900) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    local = ("--local-addr", "127.0.0.1")
    agents = [launch(config, two, 1, (*rendezvous(2, index, endpoint), *local)) for index in range(2)]
    assert [agent.wait(timeout=900) for agent in agents] == [0, 0]
    expected = load_state(one)["parameters"]
    assert all(torch.equal(value, expected[name]) for name, value in load_state(two)["parameters"].items())
    assert [event["loss"] for event in events(two)] == [event["loss"] for event in events(one)]


@pytest.mark.slow
def test_killed_while_training_and_started_again_ends_with_the_same_weights(make_config, launch, tmp_path):
    config = make_config(steps=40, checkpoint_every=5, log_every=5)
    whole, killed = RunDir(tmp_path / "whole"), RunDir(tmp_path / "killed")
    assert launch(config, whole).wait(timeout=900) == 0
    job = launch(config, killed)
    while job.poll() is None and not list(killed.checkpoints.glob("step-*.pt")):
        signal.sigtimedwait([], 0.01)
    job.send_signal(signal.SIGKILL)
    assert job.wait(timeout=60) == -signal.SIGKILL
    assert launch(config, killed).wait(timeout=900) == 0
    expected = load_state(whole)["parameters"]
    assert all(torch.equal(value, expected[name]) for name, value in load_state(killed)["parameters"].items())


def test_more_processes_than_examples_in_a_batch_are_refused(make_config, accelerator, tmp_path, monkeypatch):
    config = make_config(batch_size=1)
    method = config.build(0, None, accelerator)
    monkeypatch.setattr(type(accelerator), "num_processes", 2)
    with pytest.raises(ConfigError, match="batch_size is 1"):
        fit(method, config, RunDir(tmp_path / "run"), accelerator)
