import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from dpo_recipes import machine


@pytest.mark.parametrize(
    ("busy", "processes_", "threads"),
    [
        ([0, 0], 1, 2),
        ([4, 6], 1, 2),
        ([100, 5], 1, 1),
        ([60, 60], 1, 1),
        ([100, 100], 1, 1),
        ([0, 0], 2, 1),
        ([0] * 8, 2, 4),
        ([0] * 64, 1, 8),
    ],
)
def test_threads_are_the_free_cores(
    monkeypatch: pytest.MonkeyPatch, busy: list[int], processes_: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(len(busy))), raising=False)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: [float(share) for share in busy])
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: len(busy))
    monkeypatch.setattr(machine, "CPU_QUOTA", Path("no such file"))
    assert machine.free_threads(processes_) == threads


def test_a_containers_quota_limits_the_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(machine, "CPU_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: [0.0] * 8)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    quota.write_text("200000 100000\n")
    assert machine.free_threads(1) == 2
    quota.write_text("max 100000\n")
    assert machine.free_threads(1) == 8


def test_a_command_in_this_process_takes_the_free_threads_and_hands_none_on(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(machine, "free_threads", lambda processes: before + 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    machine.set_environment()
    assert torch.get_num_threads() == before, "the user's choice"
    monkeypatch.delenv("OMP_NUM_THREADS")
    try:
        machine.set_environment()
        assert torch.get_num_threads() == before + 1
        assert "OMP_NUM_THREADS" not in os.environ
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.skipif(not list(Path(torch.__file__).parent.glob("lib/libgomp*")), reason="torch has other threads here")
@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, "5000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "passive"}, "0"),
    ],
    ids=["nothing", "a number", "a policy"],
)
def test_threads_of_a_command_soon_sleep_unless_the_user_says_otherwise(given: dict[str, str], spins: str) -> None:
    """libgomp itself prints what it read from the environment."""
    environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "1"}
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        environment.pop(name, None)
    code = "import dpo_recipes.cli, dpo_recipes.machine; dpo_recipes.machine.set_environment(); import torch"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | given, capture_output=True, text=True, check=True
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_a_broken_driver_is_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.gpu_cards() == []


def test_the_processor_has_a_name_and_the_hardware_says_its_threads() -> None:
    assert machine.processor()
    expected = f"{machine.processor()}, 2 process(es) x {torch.get_num_threads()} thread(s)"
    assert machine.hardware(torch.device("cpu"), 2) == expected
