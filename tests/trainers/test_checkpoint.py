import logging

import pytest
import torch

from trainers.checkpoint import load_checkpoint, save_checkpoint
from trainers.errors import CheckpointError


def write(folder, *steps):
    for step in steps:
        save_checkpoint(folder, step, {"x": torch.full((3,), float(step))})


def test_the_newest_checkpoint_is_read_back(tmp_path):
    write(tmp_path, 1, 2)
    state = load_checkpoint(tmp_path)
    assert state is not None
    assert (state["step"], state["x"].tolist()) == (2, [2.0, 2.0, 2.0])


def test_only_the_last_two_are_kept(tmp_path):
    write(tmp_path, 5, 10, 15, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000015.pt", "step-0000020.pt"]


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", [lambda b: b[:-10], lambda b: b[:50] + b"?" + b[51:], lambda b: b""])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_it(tmp_path, caplog, damage):
    write(tmp_path, 1, 2)
    newest = tmp_path / "step-0000002.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    with caplog.at_level(logging.WARNING):
        state = load_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 1
    assert "falling back" in caplog.text


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "step-0000001.pt").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="none of 1"):
        load_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_previous_checkpoint_and_no_debris(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2)
    monkeypatch.undo()
    state = load_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001.pt"]
