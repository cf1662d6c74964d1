"""A run that a signal ends outside its training steps returns the status, leaves no process, and can be resumed.

test_resume.py and test_surroundings.py test signals within a step, a closed terminal and a pipe without a reader.
"""

import signal

import psutil
import pytest
from kills import TRAINING, came_to_the_same, moment, run

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
    ("number", "phase"),
    [
        (signal.SIGTERM, "start"),
        (signal.SIGINT, "start"),
        (signal.SIGHUP, "model"),
        (signal.SIGHUP, "checkpoint"),
        (signal.SIGTERM, "measuring"),
        (signal.SIGINT, "pages"),
    ],
)
def test_an_interrupted_run_ends_with_its_status_and_goes_on(number, phase, train, undisturbed, seed, tmp_path):
    whole, times = undisturbed("hh-rlhf-sft")
    delay, there = moment(phase, times, f"{seed} {number} {phase}"), tmp_path / "run"
    processes = []

    def interrupt(process):
        processes.extend(psutil.Process(process.pid).children(recursive=True))
        process.send_signal(number)

    _, status = run(train("hh-rlhf-sft"), tmp_path, TRAINING, output="run", at=(phase, delay, interrupt))
    told = f"--fault-seed {seed}: {number.name} {delay:.3f} s into {phase}\n{(tmp_path / 'log').read_text()}"
    finished = (there / "done.json").exists()
    assert status in ({0, 130 if number == signal.SIGINT else 143} if finished else {128 + number, 143}), told
    assert not [process for process in processes if process.is_running()], told
    while_importing = phase == "start" and told.rstrip().endswith("KeyboardInterrupt")  # Python's own message
    assert "Traceback" not in told or while_importing, told
    there_now, regular = ({path.name for path in place.glob("checkpoint-*")} for place in (there, whole))
    saved = there_now - regular
    assert len(saved) <= 1, told  # the interrupt's own, at the end of its step
    resume = ["--resume_from_checkpoint", "true"] if any(there.glob("checkpoint-*")) else []
    _, status = run(train("hh-rlhf-sft", *resume), tmp_path, TRAINING, output="run")
    told += (tmp_path / "log").read_text()
    assert status == 0, told
    came_to_the_same(there, whole, told, saved=saved)
