import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from trainers.cache import Cache
from trainers.frozen import Frozen
from trainers.packing import fits, load_packed, pack
from trainers.prior import PriorConfig
from trainers.prompt import Sample
from trainers.rundir import write_atomically


def rows(count, dtype=torch.float32):
    return [
        {"mean": torch.full((1, 2, 3), float(i), dtype=dtype), "sizes": torch.tensor([[i, i + 1]])}
        for i in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_as_they_were(tmp_path, dtype):
    pack(tmp_path, rows(5, dtype))
    kept, columns = load_packed(tmp_path)
    assert kept == [0, 1, 2, 3, 4]
    for name, column in columns.items():
        assert torch.equal(column, torch.cat([row[name] for row in rows(5, dtype)]))


def test_missing_rows_are_left_out_and_the_others_keep_their_numbers(tmp_path):
    first, second, third = rows(3)
    pack(tmp_path, [None, first, None, second, third])
    kept, columns = load_packed(tmp_path)
    assert kept == [1, 3, 4]
    assert columns["sizes"].tolist() == [[0, 1], [1, 2], [2, 3]]


def test_rows_may_come_from_a_generator(tmp_path):
    pack(tmp_path, (row for row in rows(2)))
    assert load_packed(tmp_path)[0] == [0, 1]


def test_what_was_never_packed_is_none(tmp_path):
    assert load_packed(tmp_path) is None


def test_what_was_cut_short_is_none(tmp_path):
    pack(tmp_path, rows(3))
    file = tmp_path / "mean.bin"
    file.write_bytes(file.read_bytes()[:-1])
    assert load_packed(tmp_path) is None


def test_an_interrupted_packing_leaves_nothing_that_counts(tmp_path):
    def broken():
        yield from rows(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path, broken())
    assert load_packed(tmp_path) is None
    pack(tmp_path, rows(2))
    assert load_packed(tmp_path)[0] == [0, 1]


def put(folder):
    Cache(folder).put("key", {"value": torch.zeros(1)})


def note(folder):
    write_atomically(folder / "file", "text")


def draw(folder):
    accelerator = SimpleNamespace(
        process_index=0, num_processes=1, autocast=contextlib.nullcontext, wait_for_everyone=lambda: None
    )
    frozen = SimpleNamespace(accelerator=accelerator, cache=True, backbone=None)
    PriorConfig(prompt="a thing")._draw(frozen, 64, [folder / "0000.png"])


def blank(model, requests, config):
    return (Sample(one.prompt, one.seed, Image.new("RGB", (8, 8))) for one in requests)


@pytest.mark.parametrize("write", [put, note, draw, lambda folder: pack(folder, rows(2))])
def test_two_machines_whose_processes_have_one_number_write_the_same_at_once(tmp_path, monkeypatch, write):
    monkeypatch.setattr("trainers.sampling.generate", blank)
    replace = Path.replace

    def late(self, target):
        monkeypatch.setattr(Path, "replace", replace)
        write(tmp_path)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", late)
    write(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    assert Path.replace is replace


def test_processes_wait_as_often_whether_they_find_rows_packed_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.packing.MEMORY_BYTES", 0)
    waits = []
    accelerator = SimpleNamespace(
        process_index=0, num_processes=2, is_local_main_process=True, wait_for_everyone=lambda: waits.append(0)
    )
    frozen = Frozen(None, None, Cache(tmp_path), accelerator)
    counts = []
    for _ in range(2):
        frozen.stack("rows", lambda i: f"{i:064}", lambda i: rows(1)[0], 3)
        counts.append(len(waits))
        waits.clear()
    assert counts == [2, 2]


def test_writing_to_a_mapped_column_does_not_change_the_file(tmp_path):
    pack(tmp_path, rows(2))
    load_packed(tmp_path)[1]["mean"].zero_()
    assert load_packed(tmp_path)[1]["mean"].sum() == 6


def test_a_hundred_thousand_pictures_of_sdxl_do_not_fit():
    row = {"mean": torch.empty(1, 4, 128, 128), "logvar": torch.empty(1, 4, 128, 128)}
    assert fits(row, 5_000)
    assert not fits(row, 100_000)


SCRIPT = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from trainers import packing
from trainers.cache import Cache
from trainers.frozen import Frozen

packing.MEMORY_BYTES = 0
accelerator = Accelerator(cpu=True)
made = []

def make(i):
    made.append(i)
    return None if i == 3 else {"mean": torch.full((1, 2), float(i))}

frozen = Frozen(None, None, Cache(Path(sys.argv[1])), accelerator)
kept, columns = frozen.stack("rows", lambda i: f"{i:064}", make, 7)
assert kept == [0, 1, 2, 4, 5, 6], kept
assert columns["mean"][:, 0].tolist() == kept
assert set(made) <= {0, 3, *range(accelerator.process_index, 7, 2)}, made
accelerator.end_training()
"""


@pytest.mark.slow
def test_processes_share_the_work_and_map_the_same_files(tmp_path):
    (tmp_path / "job.py").write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for _ in range(2):
        job = [sys.executable, *launcher, str(tmp_path / "job.py"), str(tmp_path / "cache")]
        subprocess.run(job, check=True, cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": "."})
    assert len(list((tmp_path / "cache").rglob("mean.bin"))) == 1
