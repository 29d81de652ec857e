# pyright: basic
from pathlib import Path

from orchestrator.replay import _new_folder
from trainers.rundir import RunDir


def test_a_replay_is_written_beside_the_earlier_ones_even_if_one_was_deleted(tmp_path: Path) -> None:
    trial = RunDir(tmp_path / "trials" / "0003")
    folders = [_new_folder(tmp_path, trial).path for _ in range(2)]
    folders[0].rmdir()
    assert _new_folder(tmp_path, trial).path == tmp_path / "replays" / "0003-3"
