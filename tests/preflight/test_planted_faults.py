"""Thirty faults planted in 400 pairs: the preflight finds each of them, and none in the clean pairs."""

import json
from collections import Counter

import planted_faults as planted
import pytest

from dpo_recipes.cli import main


@pytest.fixture
def inspect(tmp_path, monkeypatch, tiny_model):
    """What `dpo-recipes inspect` writes about rows: preflight.json."""
    monkeypatch.chdir(tmp_path)

    def run(rows):
        folder = planted.write(rows, tmp_path / "pairs")
        flags = ["--model_name_or_path", str(tiny_model), "--max_length", str(planted.MAX_LENGTH), "--profile", "cpu"]
        assert main(["inspect", str(folder), *flags, "--output_dir", str(tmp_path / "out")]) == 0
        assert (tmp_path / "out" / "preflight.html").stat().st_size > 10_000
        return json.loads((tmp_path / "out" / "preflight.json").read_text())

    return run


def test_all_thirty_planted_faults_are_found_and_named(inspect):
    assert len(planted.ROW_FAULTS) + len(planted.SET_FAULTS) + len([planted.LEAKED]) == 30
    rows = planted.corrupted()
    data = inspect(rows)
    expected = Counter(reason for reason, _ in planted.ROW_FAULTS.values()) + Counter([planted.LEAKED_REASON])
    train = data["splits"]["train"]
    assert {reason: drop["count"] for reason, drop in train["dropped"].items()} == expected
    assert train["rows"] == len(rows["train"]) == train["kept"] + sum(expected.values())
    assert data["splits"]["test"]["dropped"] == {}
    found = {finding["name"] for finding in data["findings"]}
    assert found - planted.CONSEQUENCES == set(planted.SET_FAULTS.values())
    assert data["verdict"] == "warnings"


def test_the_rows_named_are_those_planted(inspect):
    rows = planted.corrupted()
    data = inspect(rows)
    dropped = data["splits"]["train"]["dropped"]
    named = {
        reason: [rows["train"][int(name.rpartition("train.jsonl, line ")[2]) - 1] for name in drop["first"]]
        for reason, drop in dropped.items()
    }
    assert all(None in row.values() for row in named["missing_value"])
    assert all(not row["prompt"][-1:] or not row["prompt"][-1]["content"].strip() for row in named["empty_prompt"])
    assert [len(drop["first"]) for drop in dropped.values()] == [min(3, drop["count"]) for drop in dropped.values()]
    assert data["signals"]["duplicates"]["count"] == 8
    assert data["signals"]["near_duplicates"]["count"] == 14
    assert data["signals"]["contradictions"]["count"] == 2
    assert data["signals"]["frequent_prompt"]["count"] == 25
    assert data["signals"]["near_leaks"]["count"] == 1


def test_nothing_is_found_in_the_clean_pairs(inspect):
    data = inspect(planted.clean())
    assert data["findings"] == []
    assert data["verdict"] == "ok"
    assert data["total"]["dropped"] == {}
    assert data["total"]["kept"] == data["total"]["rows"] == 400
    assert data["total"]["shortened"] == 0
