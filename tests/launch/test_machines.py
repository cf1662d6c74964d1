"""Machines that train together. Hosts are network namespaces with a cable between them, which needs root."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from datetime import timedelta

import pytest
from commands import REPOSITORY
from torch.distributed import TCPStore

from dpo_recipes.doctor.miniature import miniature_flags
from dpo_recipes.errors import RecipeError
from dpo_recipes.launch import launch, machines
from dpo_recipes.launch.machines import Machines, Watch, read_machines

ONE_EACH = dict(compute_environment="LOCAL_MACHINE", distributed_type="MULTI_GPU", use_cpu=True, num_processes=1)
STAND_IN = '''"""A stand-in that trains nothing."""
import os, sys, time
from pathlib import Path

RECIPE = {}
rank = os.environ["RANK"]
Path(f"started{rank}").write_text(f"{os.getpid()} {os.environ['WORLD_SIZE']}")
if f"--fail={rank}" in sys.argv:
    sys.exit(7)
time.sleep(0 if "--end" in sys.argv else 300)
'''


# What the flags say


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((2, None, "localhost:29500"), "Each of N machines needs"),
        ((2, 0, None), "Each of N machines needs"),
        ((2, 2, "localhost:29500"), "a --rank of its own from 0 to N - 1"),
        ((2, 0, "localhost"), "--main HOST:PORT"),
        ((2, 1, "no-such-host.invalid:29500"), "does not know the name no-such-host.invalid"),
        ((2, 0, "192.0.2.7:29500"), "192.0.2.7 is no address of this machine"),
        ((2, 0, "localhost:99999"), "cannot listen at localhost:99999"),
    ],
)
def test_flags_that_name_no_meeting_place_are_refused(given, said):
    with pytest.raises(RecipeError) as refused:
        read_machines(*given)
    assert said in str(refused.value)


def test_a_port_that_is_taken_is_refused_on_the_main_machine_alone(port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(RecipeError, match=f"Port {port} is taken on this machine"):
            read_machines(2, 0, f"localhost:{port}")
        assert read_machines(2, 1, f"localhost:{port}") == Machines(2, 1, "localhost", port)


def test_machines_become_arguments_of_accelerate(tmp_path, monkeypatch):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "gpu_cards", lambda: [(81559, 9.0)] * 4)
    there = launch.prepare("stand_in.py", profile="gpu", machines=Machines(2, 1, "main", 29500))
    words = there._arguments()
    said = {name: words[words.index(f"--{name}") + 1] for name in ("num_processes", "num_machines", "machine_rank")}
    assert said == {"num_processes": "8", "num_machines": "2", "machine_rank": "1"}
    assert there.accelerate.stem == "multi_gpu"
    with pytest.raises(RecipeError, match="is for one process"):
        launch.prepare("stand_in.py", accelerate="single_gpu", machines=Machines(2, 1, "main", 29500))


# Signs of life


@pytest.fixture
def watches(port, monkeypatch):
    """Start the watch of each of two machines, in threads of this process; returns both."""
    monkeypatch.setattr(machines, "BEAT", 0.05)
    monkeypatch.setattr(machines, "SILENCE", 1.0)
    monkeypatch.setattr(machines, "WAIT", 5)
    store = TCPStore("localhost", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    both = [Watch(Machines(2, rank, "localhost", port), end_training=lambda: None) for rank in (0, 1)]
    yield both
    del store


def _until(condition, seconds=20, told=lambda: None):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition(), told()


def test_machines_that_live_leave_each_other_alone(watches):
    for watch in watches:
        watch.start()
    _until(lambda: all(len(watch._heard) == 2 for watch in watches))
    time.sleep(1.5)
    assert [watch.reason for watch in watches] == [None, None]


def test_a_silent_machine_ends_the_others(watches):
    watches[0].start()
    watches[1]._talk = lambda: None
    store = TCPStore("localhost", watches[0].machines.port, is_master=False, wait_for_workers=False)
    store.set("trains 1", machines._what())
    store.set("alive 1", "0")
    _until(lambda: watches[0].reason)
    assert "Machine 1 has not been heard of for 1 s" in watches[0].reason
    assert "--resume_from_checkpoint true" in watches[0].reason


def test_a_failure_is_told_to_the_other_machines_with_its_status(watches):
    for watch in watches:
        watch.start()
    _until(lambda: all(len(watch._heard) == 2 for watch in watches))
    watches[1].leave(7, "Rank 1 (process 11) failed with exit status 7.")
    _until(lambda: watches[0].reason)
    assert "Machine 1 has failed: Rank 1 (process 11) failed with exit status 7." in watches[0].reason
    assert watches[0].status == 7


def test_machines_that_train_something_else_stop_with_status_2(watches):
    watches[1].what = "another recipe"
    for watch in watches:
        watch.start()
    _until(lambda: all(watch.reason for watch in watches))
    assert {watch.status for watch in watches} == {2}
    assert "Machine 1 trains something else" in watches[0].reason


# Two hosts


@pytest.fixture
def hosts():
    """Two hosts, 10.77.0.1 and 10.77.0.2; returns what runs a command on one, and the names of both."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the command ip")
    names = [f"host{os.getpid()}-{rank}" for rank in (0, 1)]
    made = [subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False) for name in names]
    if any(each.returncode for each in made):
        pytest.skip("network namespaces cannot be made here")
    cable = f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}"
    subprocess.run(["ip", *cable.split()], check=True)
    for rank, name in enumerate(names):
        for what in (f"addr add 10.77.0.{rank + 1}/24 dev eth0", "link set eth0 up", "link set lo up"):
            subprocess.run(["ip", "-n", name, *what.split()], check=True)
    yield names
    for name in names:
        for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.fixture
def start(hosts, dpo_recipes, tmp_path):
    """Start `dpo-recipes train` on one of the hosts."""
    (tmp_path / "one_each.yaml").write_text(json.dumps(ONE_EACH))
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def start_one(rank, *words, main="10.77.0.1:29500", cwd=tmp_path):
        where = ["--profile", "cpu", "--accelerate", tmp_path / "one_each.yaml", "--machines", "2", "--rank", str(rank)]
        return subprocess.Popen(
            ["ip", "netns", "exec", hosts[rank], dpo_recipes, "train", *map(str, [*words, *where]), "--main", main],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start_one


def _said(both, timeout=60):
    return [process.communicate(timeout=timeout)[0] for process in both]


@pytest.mark.faults
def test_a_machine_whose_cable_is_cut_ends_the_run_on_both_within_a_minute(start, hosts, tmp_path):
    both = [start(rank, "stand_in.py") for rank in (0, 1)]
    _until(lambda: all((tmp_path / f"started{rank}").exists() for rank in (0, 1)), 150, lambda: _said(both, timeout=1))
    time.sleep(3)  # both were heard
    subprocess.run(["ip", "-n", hosts[1], "link", "set", "eth0", "down"], check=True)
    said = _said(both, timeout=75)
    assert "Machine 1 has not been heard of for 30 s" in said[0], said[0]
    assert "Machine 0 (10.77.0.1)" in said[1], said[1]
    assert [process.returncode for process in both] == [1, 1]
    assert not any(
        subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout for name in hosts
    )


@pytest.mark.slow
def test_a_failure_on_one_machine_is_known_on_the_other_with_its_rank_and_status(start, tmp_path):
    both = [start(rank, "stand_in.py", "--fail=1") for rank in (0, 1)]
    said = _said(both, timeout=90)
    assert [process.returncode for process in both] == [7, 7], said
    assert "Machine 1 has failed: Rank 1 (process" in said[0], said[0]


@pytest.mark.faults
def test_two_machines_train_as_one_does_though_one_comes_late(start, dpo_recipes, tmp_path):
    recipe = REPOSITORY / "recipes" / "hh_rlhf_lora.py"
    flags = ["hh-rlhf-lora", *miniature_flags(recipe, tmp_path), "--save_steps", "1"]
    flags += ["--pairs_per_update", "4", "--max_length", "256", "--learning_rate", "1e-3"]
    first = start(0, *flags, "--per_device_train_batch_size", "2", "--output_dir", "two")
    time.sleep(5)
    both = [first, start(1, *flags, "--per_device_train_batch_size", "2", "--output_dir", "two")]
    said = _said(both, timeout=240)
    assert [process.returncode for process in both] == [0, 0], said
    one = [dpo_recipes, "train", *flags, "--profile", "cpu", "--per_device_train_batch_size", "4"]
    done = subprocess.run([*one, "--output_dir", "one"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def losses(name):
        state = json.loads((tmp_path / name / "checkpoint-2" / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    assert losses("two") == pytest.approx(losses("one"), abs=1e-5)
    assert len(losses("two")) == 2


@pytest.mark.faults
def test_machines_keep_checkpoints_of_their_own_or_need_a_folder_that_all_see(start, tmp_path):
    """Each machine runs in a folder of its own here."""
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    flags = ["hh-rlhf-lora", *miniature_flags(REPOSITORY / "recipes" / "hh_rlhf_lora.py", tmp_path)]
    flags += ["--save_steps", "1", "--output_dir", "run", "--per_device_train_batch_size", "8"]

    def train(*more):
        both = [start(rank, *flags, *more, cwd=tmp_path / str(rank)) for rank in (0, 1)]
        return _said(both, timeout=240), [process.returncode for process in both]

    said, statuses = train()
    assert statuses == [2, 2], said
    assert "The machine of rank 1 does not see run of the main machine" in said[0]
    said, statuses = train("--save_on_each_node", "true", "--overwrite", "true")
    assert statuses == [0, 0], said
    for rank in (0, 1):
        shutil.rmtree(tmp_path / str(rank) / "run" / "checkpoint-2")
        assert (tmp_path / str(rank) / "run" / "checkpoint-1" / f"rng_state_{rank}.pth").exists()
    (tmp_path / "0" / "run" / "done.json").unlink()
    said, statuses = train("--save_on_each_node", "true", "--resume_from_checkpoint", "true")
    assert statuses == [0, 0], said
    assert "Resuming from run/checkpoint-1." in said[0]
    assert all((tmp_path / str(rank) / "run" / "checkpoint-2" / "trainer_state.json").exists() for rank in (0, 1))
