import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import REPOSITORY

WORK = ["step", "memory", "update", "PPO", "training with guards", "adapting", "tokenising", "inspecting", "start-up"]


@pytest.mark.slow
def test_the_bench_compares_every_kind_of_work_with_a_baseline(tmp_path: Path) -> None:
    bench = [sys.executable, REPOSITORY / "benchmarks" / "bench.py", "--quick", "--out", tmp_path]
    environment = {name: value for name, value in os.environ.items() if name != "DPO_RECIPES_DATA"}
    done = subprocess.run(bench, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert all(any(row.startswith(f"| {work}") for row in rows) for work in WORK), done.stdout
    assert all(" x (" in row for row in rows)
    assert done.stdout.rstrip() in (tmp_path / "bench.md").read_text()


def test_the_bench_refuses_a_part_that_it_does_not_have() -> None:
    bench = [sys.executable, REPOSITORY / "benchmarks" / "bench.py", "--only", "step,speed"]
    done = subprocess.run(bench, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "speed: the parts are step, memory" in done.stderr
