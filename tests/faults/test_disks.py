"""A run on a disk that is full or read-only ends with one message or a warning, and loses no saved update.

test_surroundings.py tests output that cannot be written.
"""

import subprocess
from contextlib import suppress

import pytest
from commands import run_forked
from kills import TRAINING, came_to_the_same, moment, run
from small_disk import small_disk

pytestmark = pytest.mark.faults


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of its own with 16 MB."""
    with small_disk(tmp_path / "disk", size="16m") as folder:
        yield folder


def fill(folder):
    """Writes until the disk is full."""
    with suppress(OSError), open(folder / "filler", "wb", buffering=0) as filler:
        while filler.write(bytes(2**20)):
            pass


@pytest.mark.parametrize(
    "phase",
    [phase for phase in TRAINING if phase not in {"start", "merging", "page", "exit"}],
)
def test_a_disk_that_fills_up_costs_no_update_that_was_saved(phase, train, undisturbed, seed, disk, tmp_path):
    """The same command goes on after space is freed."""
    whole, times = undisturbed("hh-rlhf-sft")
    delay, there = moment(phase, times, f"{seed} disk {phase}"), disk / "run"
    call = [*train("hh-rlhf-sft"), "--output_dir", str(there)]
    _, status = run(call, tmp_path, TRAINING, output="disk/run", at=(phase, delay, lambda _: fill(disk)))
    told = f"--fault-seed {seed}: the disk was full {delay:.3f} s into {phase}\n{(tmp_path / 'log').read_text()}"
    assert status == 0 or (status == 1 and "A disk is full" in told), told
    assert "Traceback" not in told, told
    (disk / "filler").unlink()
    resume = ["--resume_from_checkpoint", "true"] if any(there.glob("checkpoint-*")) else []
    _, status = run([*call, *resume], tmp_path, TRAINING, output="disk/run")
    told += (tmp_path / "log").read_text()
    assert status == 0, told
    came_to_the_same(there, whole, told)


@pytest.mark.slow
@pytest.mark.parametrize("below", ["", "run", "new/run"])
def test_a_disk_that_cannot_be_written_is_found_before_the_data_is_read(below, train, disk, tmp_path):
    (disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    result = run_forked(*train("hh-rlhf-sft")[1:], "--output_dir", disk / below, cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert f"Cannot write into {disk / below if below != 'new/run' else disk}: Read-only file system" in result.stderr
    assert "Data account" not in result.stdout
