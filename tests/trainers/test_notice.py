# pyright: basic
import os
import signal

import pytest
import torch

from tests.contracts.method import weights
from trainers.errors import StoppedError
from trainers.loop import fit
from trainers.rundir import RunDir


def told_in_step(method, number):
    """SIGTERM arrives while that step is computed."""
    losses = method.losses

    def interrupted(batch):
        if batch.step == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(batch)

    method.losses = interrupted
    return method


def test_training_that_is_told_to_end_loses_no_step(make_config, accelerator, tmp_path):
    config = make_config(checkpoint_every=100)
    whole = config.build(0, None, accelerator)
    fit(whole, config, RunDir(tmp_path / "whole"), accelerator)
    run = RunDir(tmp_path / "run")
    with pytest.raises(StoppedError, match="after step 4 of 6"):
        fit(told_in_step(config.build(0, None, accelerator), 3), config, run, accelerator)
    rest = config.build(0, None, accelerator)
    seen = []
    losses = rest.losses
    rest.losses = lambda batch: seen.append(batch.step) or losses(batch)
    fit(rest, config, run, accelerator)
    assert seen == [4, 5]
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(rest).items())


def test_told_in_its_last_step_training_just_ends(make_config, accelerator, tmp_path):
    config = make_config()
    fit(told_in_step(config.build(0, None, accelerator), 5), config, RunDir(tmp_path / "run"), accelerator)


def test_outside_of_training_the_signal_is_as_it_was(make_config, accelerator, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    config = make_config(steps=1)
    fit(config.build(0, None, accelerator), config, RunDir(tmp_path / "run"), accelerator)
    assert signal.getsignal(signal.SIGTERM) is before
