import json
import math

import pytest

from evaluation.records import Record, panel, read_records, write_records
from trainers.errors import DataError
from trainers.rundir import RunResult, Score

RECORDS = [
    Record(prompt="a « zog »", seed=0, file="samples/0.png", values={"x": 0.1, "y": 9.0}),
    Record(prompt="a « zog »", seed=1, file="samples/1.png", values={"x": math.nan, "y": 8.0}),
]


def test_records_survive_the_file(tmp_path):
    write_records(tmp_path / "records.jsonl", RECORDS)
    back = read_records(tmp_path / "records.jsonl")
    assert [record.prompt for record in back] == ["a « zog »"] * 2
    assert back[0] == RECORDS[0]
    assert math.isnan(back[1].values["x"])


def test_an_undefined_value_is_null_in_the_file(tmp_path):
    write_records(tmp_path / "records.jsonl", RECORDS)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["values"] == {"x": None, "y": 8.0}


def test_a_run_without_records_is_named(tmp_path):
    with pytest.raises(DataError, match=r"records\.jsonl: no such file"):
        read_records(tmp_path / "records.jsonl")


def test_records_become_a_panel_by_prompt_and_seed():
    assert panel(RECORDS, "y") == {("a « zog »", 0): 9.0, ("a « zog »", 1): 8.0}


def test_an_undefined_score_survives_a_result_file():
    score = Score(mean=math.nan, standard_error=math.nan, num_samples=0, num_undefined=2, model="clip@0")
    result = RunResult(scores={"x": score}, seconds={}, peak_bytes=0, versions={})
    back = RunResult.model_validate_json(result.model_dump_json())
    assert math.isnan(back.scores["x"].mean)
    assert math.isnan(back.scores["x"].standard_error)
