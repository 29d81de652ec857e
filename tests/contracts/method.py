"""What every training method must do; each kind's own test inherits this."""

# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportOperatorIssue=false

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from trainers.batch import Batch
from trainers.loop import fit
from trainers.rundir import RunDir
from trainers.validation import ValidationConfig, validation_batches

CURVES = Path(__file__).parent / "curves"


class InterruptionError(Exception):
    pass


def weights(method):
    return {
        f"{name}.{key}": value.detach().clone()
        for name, trained in method.trained().items()
        for key, value in trained.parameters().items()
    }


def held(holder):
    """Every network that something of ours holds, wherever it keeps it."""
    found, seen, waiting = [], {}, [holder]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        if isinstance(one, torch.nn.Module):
            found.append(one)
        elif isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
        elif type(one).__module__.startswith("trainers."):
            waiting += vars(one).values()
    return found


def tensors(holder):
    """All weights and buffers of what `held` finds, each once."""
    every = [value for network in held(holder) for value in (*network.parameters(), *network.buffers())]
    return list({id(value): value for value in every}.values())


@torch.no_grad()
def predict(model, prompts):
    """Answers at little and at much noise."""
    rows = [prompt for prompt in prompts for _ in range(2)]
    x_t = torch.randn(len(rows), *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    return model.denoise(x_t, torch.tensor([7, 700] * len(prompts)), model.prepare(rows, 64, 64))


def shake(method, scale=0.1):
    """Move everything that is trained, as if it had been."""
    rng = torch.Generator().manual_seed(5)
    for trained in method.trained().values():
        for value in trained.parameters().values():
            value.data.add_(torch.randn(value.shape, generator=rng), alpha=scale)


def interrupt(method, step):
    """Raise from the first loss of optimizer step `step`."""
    losses = method.losses

    def raising(batch):
        if batch.step == step:
            raise InterruptionError
        return losses(batch)

    method.losses = raising


class MethodContract:
    """Subclasses provide the fixture `config`: six optimizer steps, a checkpoint every two, batches of four.

    Where a method can be told more than words, they provide `prompts` too.
    """

    @pytest.fixture
    def config(self):
        raise NotImplementedError

    @pytest.fixture
    def method(self, config, accelerator):
        return config.build(0, None, accelerator)

    def test_every_trainable_weight_gets_a_gradient_and_no_frozen_one(self, method, config, accelerator, tmp_path):
        fit(method, config.model_copy(update={"steps": 1}), RunDir(tmp_path / "run"), accelerator)
        method.losses(Batch(0, (0, 1, 2, 3), (0, 1, 2, 3))).sum().backward()
        trainable = {id(p) for trained in method.trained().values() for p in trained.parameters().values()}
        networks = held(method)
        assert {*method.backbone.networks.values(), method.backbone.vae} <= {*networks}
        for network in networks:
            for name, parameter in network.named_parameters():
                if id(parameter) in trainable:
                    assert parameter.grad is not None, name
                    assert parameter.grad.abs().sum() > 0, name
                else:
                    assert parameter.grad is None, name

    def test_what_is_trained_is_what_is_optimised_and_saved_and_nothing_else_changes(
        self, method, config, accelerator, tmp_path
    ):
        before = weights(method)
        trainable = {id(p) for trained in method.trained().values() for p in trained.parameters().values()}
        frozen = [(value, value.clone()) for value in tensors(method) if id(value) not in trainable]
        run = RunDir(tmp_path / "run")
        fit(method, config, run, accelerator)
        state = load_state(run)
        assert state["parameters"].keys() == before.keys()
        optimised = sum(len(group["params"]) for group in state["optimizer"]["param_groups"])
        assert optimised == len(state["optimizer"]["state"]) == len(before)
        for name, value in weights(method).items():
            assert torch.equal(state["parameters"][name], value), name
            assert not torch.equal(value, before[name]), name
        assert frozen
        assert all(torch.equal(value, copy) for value, copy in frozen)

    def test_before_training_it_is_the_model_that_is_not_trained(self, method, config, accelerator, prompts):
        untrained = config.load_trained(None, accelerator)
        torch.testing.assert_close(predict(method.model, prompts), predict(untrained, prompts), atol=1e-6, rtol=0)

    def test_what_is_exported_is_loaded_frozen_and_predicts_the_same(
        self, method, config, accelerator, prompts, tmp_path
    ):
        before = predict(method.model, prompts)
        shake(method)
        method.export(tmp_path / "adapter")
        loaded = config.load_trained(tmp_path / "adapter", accelerator)
        expected = predict(method.model, prompts)
        torch.testing.assert_close(predict(loaded, prompts), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(expected, before, atol=1e-3)
        assert not any(value.requires_grad for value in tensors(loaded))

    def test_trainable_weights_are_float32(self, method):
        assert {value.dtype for value in weights(method).values()} == {torch.float32}

    @torch.no_grad()
    def test_losses_are_a_function_of_seed_step_and_place(self, method):
        places, indices = (0, 1, 2, 3), (1, 0, 2, 3)
        whole = method.losses(Batch(3, places, indices))
        assert torch.equal(whole, method.losses(Batch(3, places, indices)))
        assert not torch.allclose(whole, method.losses(Batch(4, places, indices)))
        # Neither the order of rows nor who else is in the batch matters: halves of it, or single rows.
        turned = method.losses(Batch(3, places[::-1], indices[::-1])).flip(0)
        torch.testing.assert_close(turned, whole, atol=1e-7, rtol=1e-5)
        for size in (1, 2):
            parts = [Batch(3, places[i : i + size], indices[i : i + size]) for i in range(0, 4, size)]
            torch.testing.assert_close(torch.cat([method.losses(part) for part in parts]), whole, atol=1e-7, rtol=1e-5)

    def test_initial_weights_are_a_function_of_the_seed(self, config, accelerator):
        first, again, other = (weights(config.build(seed, None, accelerator)) for seed in (0, 0, 1))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)

    def test_interrupted_and_resumed_equals_uninterrupted(self, config, accelerator, tmp_path):
        whole, run = config.build(0, None, accelerator), RunDir(tmp_path / "whole")
        fit(whole, config, run, accelerator)
        broken, halves = config.build(0, None, accelerator), RunDir(tmp_path / "halves")
        interrupt(broken, 3)
        with pytest.raises(InterruptionError):
            fit(broken, config, halves, accelerator)
        resumed = config.build(0, None, accelerator)
        fit(resumed, config, halves, accelerator)
        expected = weights(whole)
        assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
        assert losses(halves) == losses(run)

    def test_held_out_examples_are_judged_on_noise_that_never_changes(self, config, accelerator, tmp_path):
        validation = ValidationConfig(every=1, draws=3)
        data = config.data.model_copy(update={"holdout": 2})
        changed = config.model_copy(update={"data": data, "validation": validation, "steps": 1})
        method = changed.build(0, None, accelerator)
        with torch.no_grad():
            together, again, alone = (
                torch.cat([method.losses(batch) for batch in validation_batches(method, 3, size)]) for size in (4, 4, 1)
            )
        assert torch.equal(together, again)
        torch.testing.assert_close(alone, together, atol=1e-6, rtol=1e-5)
        assert len(set(together.tolist())) == 6
        run = RunDir(tmp_path / "run")
        fit(method, changed, run, accelerator)
        (event,) = (event for _, event in run.read_events() if event["event"] == "validation")
        assert event["step"] == 1
        assert math.isfinite(event["loss"])

    def test_ten_steps_have_the_losses_they_had(self, config, accelerator, tmp_path, request):
        """A change detector. After a wanted change: RECORD_CURVES=1 pytest tests/trainers/methods -k ten_steps."""
        changed = config.model_copy(update={"steps": 10, "log_every": 1, "checkpoint_every": 10})
        run = RunDir(tmp_path / "run")
        fit(changed.build(0, None, accelerator), changed, run, accelerator)
        curve = list(losses(run).values())
        file = CURVES / f"{request.path.stem.removeprefix('test_')}.{type(self).__name__}.json"
        if os.environ.get("RECORD_CURVES"):
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(curve) + "\n", encoding="utf-8")
        assert file.is_file(), "no curve was recorded; run this test once with RECORD_CURVES=1"
        assert curve == pytest.approx(json.loads(file.read_text(encoding="utf-8")), rel=1e-3)

    def test_micro_batches_do_not_change_the_mathematics(self, config, accelerator, tmp_path):
        results = []
        for size in (None, 3):
            changed = config.model_copy(update={"micro_batch_size": size, "steps": 3})
            method = changed.build(0, None, accelerator)
            fit(method, changed, RunDir(tmp_path / str(size)), accelerator)
            results.append(weights(method))
        for name, value in results[1].items():
            torch.testing.assert_close(value, results[0][name], atol=1e-4, rtol=1e-3)

    def test_export_writes_no_frozen_weight(self, method, tmp_path):
        from safetensors.torch import load_file

        method.export(tmp_path / "adapter")
        exported = [t for file in (tmp_path / "adapter").iterdir() for t in load_file(file).values()]
        assert sorted(t.shape for t in exported) == sorted(t.shape for t in weights(method).values())


def load_state(run):
    from trainers.checkpoint import load_checkpoint

    return load_checkpoint(run.checkpoints)


def losses(run):
    """The last logged loss of every step: an interrupted run logs some steps twice."""
    return {event["step"]: event["loss"] for _, event in run.read_events() if event["event"] == "train"}
