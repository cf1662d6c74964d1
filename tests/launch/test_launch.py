"""Every test that starts processes uses stand-in recipes: plain Python, without torch."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from commands import REPOSITORY

from dpo_recipes.errors import RecipeError
from dpo_recipes.flags import grouped
from dpo_recipes.launch import launch, processes
from dpo_recipes.launch.launch import Launch
from dpo_recipes.machine import ENVIRONMENT

STAND_IN = '''"""A stand-in that trains nothing."""
import json, os, signal, sys, time
from pathlib import Path

RECIPE = dict(output_dir="outputs/first")

def stop(number, _):
    with open("signals", "a") as file:
        file.write(f"{number}\\n")
    if "--ignore" not in sys.argv:
        sys.exit(128 + number)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
about = {"pid": os.getpid(), "environment": dict(os.environ)}
Path(f"started{os.environ.get('RANK', '')}").write_text(json.dumps(about))
if "--worker" in sys.argv and os.fork() == 0:
    Path("worker").write_text(str(os.getpid()))
    time.sleep(60)
if "--sleep" in sys.argv:
    for _ in range(600):
        time.sleep(0.1)
sys.exit(int(sys.argv[sys.argv.index("--status") + 1]) if "--status" in sys.argv else 0)
'''

STAGE = '''"""A stand-in for a stage: leaves a model and its done.json."""
import json, os, sys
from pathlib import Path

RECIPE = dict(output_dir="outputs/first", dataset_name="rows.jsonl")

if __name__ == "__main__":
    with open("log", "a") as file:
        file.write(" ".join(["first", *sys.argv[3:]]) + "\\n")
    Path("outputs/first").mkdir(parents=True, exist_ok=True)
    request = json.dumps({"request": os.environ["DPO_RECIPES_REQUEST"]})
    Path("outputs/first/settings.json").write_text(request)
    if Path("fail").exists():
        sys.exit(7)
    Path("outputs/first/config.json").write_text("{}")
    Path("outputs/first/done.json").write_text(request)
'''

SECOND = '''"""A stand-in that starts from `first`."""
import sys

RECIPE = dict(model_name_or_path="outputs/first", output_dir="outputs/second")

if __name__ == "__main__":
    with open("log", "a") as file:
        file.write(" ".join(["second", *sys.argv[3:]]) + "\\n")
'''


REWARD = STAGE.replace("first", "reward").replace("dict(", 'dict(model_name_or_path="outputs/first", ')

THIRD = SECOND.replace("second", "third").replace("dict(", 'dict(reward_model_name_or_path="outputs/reward", ')
"""A stand-in that starts from `first` and from `reward`, which starts from `first` too."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of recipes without torch, whose profile is empty."""
    recipes = tmp_path / "recipes"
    (recipes / "profiles").mkdir(parents=True)
    (recipes / "profiles" / "cpu.yaml").write_text("use_cpu: true\n")
    (recipes / "stand_in.py").write_text(STAND_IN)
    return tmp_path


@pytest.fixture
def start(folder: Path, dpo_recipes: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start `dpo-recipes train ...` as a terminal would; whatever is left is killed at the end."""
    started: list[subprocess.Popen] = []

    def start_one(*arguments: str, **environment: str) -> subprocess.Popen:
        command = [dpo_recipes, "train", *arguments, "--profile", "cpu"]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests may run under nohup
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        for pid in [process.pid, *(child.pid for child in _descendants(process.pid))]:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=10)


def _descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True) if psutil.pid_exists(pid) else []


def _wait_for(path: Path, timeout: float = 60) -> str:
    """The content of a file, once it is there and whole."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.05)
    raise AssertionError(f"{path.name} did not appear")


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _gone(pid: int, timeout: float = 10) -> bool:
    deadline = time.monotonic() + timeout
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not _alive(pid)


@pytest.mark.parametrize("status", [0, 1, 2, 7])
def test_exit_status_is_the_recipes_own(start: Callable, status: int) -> None:
    process = start("stand-in", "--status", str(status))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert "Traceback" not in output
    assert "CalledProcessError" not in output


def test_prints_the_command_to_type_by_hand(start: Callable, folder: Path) -> None:
    output, _ = start("stand-in", "--status", "0").communicate(timeout=60)
    line = output.splitlines()[0]
    config = REPOSITORY / "recipes" / "accelerate" / "cpu.yaml"
    expected = f"accelerate launch --config_file {config} recipes/stand_in.py --config recipes/profiles/cpu.yaml"
    assert line == f"{expected} --status 0"
    by_hand = subprocess.run(
        f"{Path(sys.executable).parent}/{expected} --status 0", shell=True, cwd=folder, capture_output=True, check=False
    )
    assert by_hand.returncode == 0, by_hand.stderr


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)],
    ids=lambda value: str(value),
)
def test_a_signal_reaches_the_recipe_once(start: Callable, folder: Path, number: signal.Signals, status: int) -> None:
    process = start("stand-in", "--sleep")
    pid = json.loads(_wait_for(folder / "started"))["pid"]
    os.killpg(process.pid, number)  # to the whole foreground group, as a terminal does
    output, _ = process.communicate(timeout=30)
    assert process.returncode == status, output
    assert (folder / "signals").read_text().split() == [str(status - 128)]
    assert not _alive(pid)
    assert "Traceback" not in output


def test_a_signal_before_the_recipe_has_started_ends_the_run(start: Callable, folder: Path) -> None:
    process = start("stand-in", "--sleep")
    assert process.stdout.readline().startswith("accelerate launch")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143


def test_a_killed_recipe_gives_137(start: Callable, folder: Path) -> None:
    process = start("stand-in", "--sleep", "--worker")
    pid = json.loads(_wait_for(folder / "started"))["pid"]
    worker = int(_wait_for(folder / "worker"))
    os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == 137
    assert not _alive(worker), "a process of the recipe's own was left behind"


def test_the_third_ctrl_c_kills_a_recipe_that_ignores_it(start: Callable, folder: Path) -> None:
    process = start("stand-in", "--sleep", "--ignore")
    pid = json.loads(_wait_for(folder / "started"))["pid"]
    for count in (1, 2):
        process.send_signal(signal.SIGINT)
        while (_wait_for(folder / "signals")).split() != ["2"] * count:
            time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 137
    assert not _alive(pid)


def test_nothing_is_left_when_accelerate_is_killed(start: Callable, folder: Path) -> None:
    process = start("stand-in", "--sleep")
    pid = json.loads(_wait_for(folder / "started"))["pid"]
    os.kill(psutil.Process(pid).ppid(), signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == 137
    assert not _alive(pid)
    assert (folder / "signals").read_text().split() == ["15"], "it was given the time to save"


def test_nothing_is_left_when_the_launcher_itself_is_killed(start: Callable, folder: Path) -> None:
    process = start("stand-in", "--sleep")
    pid = json.loads(_wait_for(folder / "started"))["pid"]
    inside = psutil.Process(pid).ppid()
    process.kill()
    assert _gone(pid)
    assert _gone(inside)
    assert (folder / "signals").read_text().split() == ["15"]


def test_what_ignores_sigterm_is_killed_after_the_grace() -> None:
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    processes.end_session(process.pid, grace=0.2)
    assert process.wait(timeout=5) == -signal.SIGKILL
    process.stdout.close()


@pytest.mark.parametrize("frozen", ["stopped", "asleep"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_frozen_process_of_two_ends_the_run_soon_after_a_signal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, frozen: str, number: int, status: int
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(processes, "STANDSTILL", 3.0)
    flags = ["--sleep", *(["--ignore"] if frozen == "asleep" else [])]

    def freeze_and_stop() -> None:
        pids = [json.loads(_wait_for(folder / f"started{rank}"))["pid"] for rank in (0, 1)]
        if frozen == "stopped":
            os.kill(pids[1], signal.SIGSTOP)
        os.kill(os.getpid(), number)

    threading.Thread(target=freeze_and_stop, daemon=True).start()
    supervised = [str(REPOSITORY / "recipes" / "accelerate" / "cpu2.yaml"), str(folder / "recipes" / "stand_in.py")]
    assert processes.supervise(["--config_file", *supervised, *flags], dict(os.environ)) == status
    assert "A process of the run is frozen" in capsys.readouterr().err, "else it took 60 s"
    assert all(_gone(json.loads((folder / f"started{rank}").read_text())["pid"]) for rank in (0, 1))


def test_a_process_that_works_or_waits_for_a_disk_is_not_frozen() -> None:
    before, worker = {1: 100.0}, {2: 50.0}
    busy, idle = {1: 100.0 + processes.STANDSTILL / 2}, {1: 100.1}
    assert not processes._is_frozen(before, busy, {"running", "sleeping"})
    assert not processes._is_frozen(before | worker, busy, {"running"}), "a worker that has ended takes nothing away"
    assert not processes._is_frozen(before, idle, {"disk-sleep", "sleeping"})
    assert processes._is_frozen(before, idle, {"sleeping"})
    assert processes._is_frozen(before, busy, {"running", "stopped"}), "a process that spins while it waits"


def test_a_hangup_that_nohup_ignores_stays_ignored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        supervised = [str(REPOSITORY / "recipes" / "accelerate" / "cpu.yaml"), str(folder / "recipes" / "stand_in.py")]
        assert processes.supervise(["--config_file", *supervised, "--status", "7"], dict(os.environ)) == 7
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_two_processes_start_and_end_together(
    start: Callable, folder: Path, number: signal.Signals, status: int
) -> None:
    process = start("stand-in", "--sleep", "--accelerate", "cpu2")
    started = [json.loads(_wait_for(folder / f"started{rank}")) for rank in (0, 1)]
    assert [entry["environment"]["WORLD_SIZE"] for entry in started] == ["2", "2"]
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert not any(_alive(entry["pid"]) for entry in started)


def test_one_of_two_processes_killed_ends_the_other(start: Callable, folder: Path) -> None:
    process = start("stand-in", "--sleep", "--accelerate", "cpu2")
    started = [json.loads(_wait_for(folder / f"started{rank}")) for rank in (0, 1)]
    os.kill(started[1]["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 137, output
    assert f"Rank 1 (process {started[1]['pid']}) was ended by SIGKILL" in output
    assert not _alive(started[0]["pid"])


@pytest.mark.parametrize("how", ["asleep", "stopped"])
def test_processes_that_stand_still_are_ended_with_a_word_on_each(start: Callable, folder: Path, how: str) -> None:
    process = start("stand-in", "--sleep", "--accelerate", "cpu2", DPO_RECIPES_HANG="3")
    pids = [json.loads(_wait_for(folder / f"started{rank}"))["pid"] for rank in (0, 1)]
    if how == "stopped":
        os.kill(pids[1], signal.SIGSTOP)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    what = "is stopped; the others wait for it" if how == "stopped" else "waits. Its stack is below"
    assert f"Rank 1 (process {pids[1]}) {what}" in output
    assert "A process of the run is frozen" in output
    assert not any(map(_alive, pids))


@pytest.mark.slow
def test_one_process_may_stand_still(start: Callable, folder: Path) -> None:
    process = start("stand-in", "--sleep", DPO_RECIPES_HANG="1")
    pid = json.loads(_wait_for(folder / "started"))["pid"]
    time.sleep(4)
    assert _alive(pid)
    assert process.poll() is None


@pytest.mark.slow
def test_a_message_of_another_rank_than_0_is_shown(start: Callable, folder: Path) -> None:
    script = folder / "recipes" / "one_fails.py"
    script.write_text(
        '"""Rank 1 finds its disk full."""\n'
        "import errno, os, time\nfrom dpo_recipes.recipe import run\n"
        "def main():\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "    time.sleep(60)\n"
        "run(main)\n"
    )
    process = start("one_fails", "--accelerate", "cpu2")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "failed with exit status 1: A disk is full." in output
    assert "Rank 1 (process" in output


@pytest.mark.parametrize("status", [0, 2, 7])
def test_exit_status_of_two_processes(start: Callable, status: int) -> None:
    process = start("stand-in", "--status", str(status), "--accelerate", "cpu2")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output


@pytest.mark.slow
def test_accelerate_gathers_over_gloo(start: Callable, folder: Path) -> None:
    script = folder / "recipes" / "gathers.py"
    script.write_text(
        '"""Adds the ranks up."""\n'
        "import torch\nfrom accelerate import Accelerator\n"
        "accelerator = Accelerator(cpu=True)\n"
        "total = accelerator.reduce(torch.tensor(accelerator.process_index + 1))\n"
        "accelerator.print('sum', int(total), 'on', accelerator.device, torch.distributed.get_backend())\n"
        "accelerator.end_training()\n"
    )
    process = start("gathers", "--accelerate", "cpu2")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "sum 3 on cpu:0 gloo" in output


def test_the_environment_has_defaults_that_the_user_can_change(
    start: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_DISABLE_TELEMETRY", "GOMP_SPINCOUNT"):  # the tests have them, too
        monkeypatch.delenv(name, raising=False)
    start("stand-in", TOKENIZERS_PARALLELISM="true", OMP_NUM_THREADS="3").communicate(timeout=60)
    environment = json.loads(_wait_for(folder / "started"))["environment"]
    assert environment["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert environment["TOKENIZERS_PARALLELISM"] == "true"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["GOMP_SPINCOUNT"] == ENVIRONMENT["GOMP_SPINCOUNT"]
    assert len(environment["DPO_RECIPES_REQUEST"]) == 64


# The stage before


@pytest.fixture
def stages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Train `second` in a folder where it needs `first`, without accelerate; returns what ran, with its flags."""
    recipes = folder / "recipes"
    (recipes / "first.py").write_text(STAGE)
    (recipes / "second.py").write_text(SECOND)
    (recipes / "reward.py").write_text(REWARD)
    (recipes / "third.py").write_text(THIRD)
    (folder / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(launch, "gpu_cards", list)
    monkeypatch.setattr(Launch, "check", lambda self, *_: 0)

    def run_directly(arguments: list[str], environment: dict[str, str]) -> int:
        return subprocess.run([sys.executable, *arguments[2:]], env=environment, check=False).returncode

    monkeypatch.setattr(processes, "supervise", run_directly)

    def train(*flags: str, name: str = "second", status: int = 0) -> list[str]:
        Path("log").write_text("")
        assert launch.prepare(name, flags=flags).run() == status
        return Path("log").read_text().splitlines()

    return train


def test_a_missing_stage_is_trained_first(stages: Callable, capfd: pytest.CaptureFixture) -> None:
    assert stages("--beta", "0.3") == ["first", "second --beta 0.3"]
    said = "second needs first, which is trained first: outputs/first/done.json is missing"
    assert said in capfd.readouterr().out


def test_a_finished_stage_is_not_trained_again(stages: Callable) -> None:
    stages()
    assert stages() == ["second"]
    assert stages("--beta", "0.3") == ["second --beta 0.3"]


def test_a_finished_run_trains_no_stage_before_it(stages: Callable, capfd: pytest.CaptureFixture) -> None:
    stages()
    request = launch.prepare("second").request()
    Path("outputs/second").mkdir()
    Path("outputs/second/done.json").write_text(json.dumps({"request": request}))
    shutil.rmtree("outputs/first")
    assert stages() == []
    assert "outputs/second holds this run, finished: nothing to do. Its page is missing" in capfd.readouterr().out
    assert stages("--overwrite", "true") == ["first", "second --overwrite true"]


def test_a_stage_trained_by_hand_counts(stages: Callable) -> None:
    assert stages("--resume_from_checkpoint", "true", name="first") == ["first --resume_from_checkpoint true"]
    assert stages() == ["second"]


@pytest.mark.parametrize("changed", ["recipes/first.py", "recipes/profiles/cpu.yaml", "rows.jsonl"])
def test_a_stage_that_changed_is_trained_again(stages: Callable, changed: str, capfd: pytest.CaptureFixture) -> None:
    stages()
    with open(changed, "a") as file:
        file.write("\n")
    assert stages() == ["first --overwrite true", "second"]
    assert "another recipe, profile, flags, data or code" in capfd.readouterr().out


def test_a_stage_trained_with_other_flags_is_trained_again(stages: Callable) -> None:
    stages("--max_steps", "3", name="first")
    assert stages() == ["first --overwrite true", "second"]


def test_a_finished_model_named_by_a_flag_is_taken_as_it_stands(stages: Callable) -> None:
    stages("--max_steps", "3", name="first")
    model = ("--model_name_or_path", "outputs/first")
    assert stages(*model) == ["second --model_name_or_path outputs/first"]


def test_an_unfinished_model_named_by_a_flag_is_never_replaced(stages: Callable) -> None:
    Path("fail").touch()
    stages("--max_steps", "3", name="first", status=7)
    Path("fail").unlink()
    model = ("--model_name_or_path", "outputs/first")
    assert stages(*model) == ["first", "second --model_name_or_path outputs/first"]  # the stage itself refuses


def test_an_unreadable_record_counts_as_missing(stages: Callable) -> None:
    stages()
    Path("outputs/first/done.json").write_text("[half")
    assert stages() == ["first --overwrite true", "second"]


def test_an_interrupted_stage_goes_on(stages: Callable) -> None:
    Path("fail").touch()
    stages(status=7)
    Path("fail").unlink()
    assert stages() == ["first --resume_from_checkpoint true", "second"]


def test_an_interrupted_stage_of_another_request_is_replaced(stages: Callable) -> None:
    Path("fail").touch()
    stages(status=7)
    Path("fail").unlink()
    Path("rows.jsonl").write_text("{}\n{}\n")
    assert stages() == ["first --overwrite true", "second"]


def test_a_folder_of_another_hand_is_never_replaced(stages: Callable) -> None:
    Path("outputs/first/checkpoint-5000").mkdir(parents=True)
    assert stages() == ["first", "second"]  # the stage itself refuses such a folder


def test_a_stage_trained_without_the_launcher_is_taken(stages: Callable) -> None:
    stages()
    Path("outputs/first/done.json").write_text(json.dumps({"request": None, "seed": 42}))
    assert stages() == ["second"]


def test_a_failed_stage_ends_the_run_with_its_status(stages: Callable) -> None:
    Path("fail").touch()
    assert stages(status=7) == ["first"]


def test_a_model_from_elsewhere_needs_no_stage(stages: Callable) -> None:
    assert stages("--model_name_or_path=Qwen/Qwen2.5-1.5B-Instruct") == [
        "second --model_name_or_path=Qwen/Qwen2.5-1.5B-Instruct"
    ]


def test_the_profile_can_name_the_stage(stages: Callable) -> None:
    Path("recipes/profiles/cpu.yaml").write_text("use_cpu: true\nmodel_name_or_path: some/model\n")
    assert stages() == ["second"]


def test_two_stages_are_trained_once_each_what_the_other_needs_first(stages: Callable) -> None:
    assert stages(name="third") == ["first", "reward", "third"]
    assert stages(name="third") == ["third"]


def test_a_stage_that_only_the_other_stage_needs_is_trained_first(stages: Callable) -> None:
    model = "--model_name_or_path=some/model"
    assert stages(model, name="third") == ["first", "reward", f"third {model}"]


def test_a_changed_first_stage_changes_what_was_made_from_it(stages: Callable) -> None:
    stages(name="third")
    with open("recipes/first.py", "a") as file:
        file.write("\n")
    assert stages(name="third") == ["first --overwrite true", "reward --overwrite true", "third"]


def test_a_changed_reward_stage_leaves_the_first_alone(stages: Callable) -> None:
    stages(name="third")
    request = launch.prepare("third").request()
    with open("recipes/reward.py", "a") as file:
        file.write("\n")
    assert launch.prepare("third").request() != request
    assert stages(name="third") == ["reward --overwrite true", "third"]


def test_a_finished_reward_model_named_by_a_flag_is_taken_as_it_stands(stages: Callable) -> None:
    stages("--max_steps", "3", name="reward")
    named = ("--reward_model_name_or_path", "outputs/reward")
    assert stages(*named, name="third") == ["third --reward_model_name_or_path outputs/reward"]
    assert stages(name="third") == ["reward --overwrite true", "third"]


def test_a_failed_stage_ends_the_run_before_the_next_begins(stages: Callable) -> None:
    Path("fail").touch()
    assert stages(name="third", status=7) == ["first"]


def test_a_dry_run_plans_each_stage_once_from_what_the_others_would_leave(
    stages: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[str | None] = []
    directly = processes.supervise

    def remember(arguments: list[str], environment: dict[str, str]) -> int:
        places.append(environment.get("DPO_RECIPES_DRY_RUN"))
        return directly(arguments, environment)

    monkeypatch.setattr(processes, "supervise", remember)
    first, reward, third = stages("--dry_run", "true", name="third")
    assert places[2] is None
    assert first == "first --dry_run true"
    assert reward == f"reward --dry_run true --model_name_or_path {places[0]}"
    assert third == f"third --dry_run true --model_name_or_path {places[0]} --reward_model_name_or_path {places[1]}"


def test_a_changed_package_changes_the_request(
    stages: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "playground.py").write_text("medicines = 20\n")
    monkeypatch.setattr(launch, "__file__", str(package / "launch.py"))
    stages()
    assert stages() == ["second"]
    (package / "playground.py").write_text("medicines = 21\n")
    assert stages() == ["first --overwrite true", "second"]


def test_a_wrong_flag_is_refused_before_a_stage_is_trained(folder: Path, start: Callable) -> None:
    imports = "from trl import DPOConfig, ModelConfig\nfrom dpo_recipes.recipe import RecipeArguments\n"
    (folder / "recipes" / "first.py").write_text(STAGE)
    (folder / "recipes" / "second.py").write_text(SECOND.replace("import sys\n", f"import sys\n{imports}"))
    process = start("second", "--bta", "0.3")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "--bta" in output
    assert not (folder / "log").exists()


# What the machine has


def test_flags_are_grouped_with_their_values() -> None:
    flags = ["--beta", "0.3", "--loss-type", "sigmoid", "sft", "--a=b=c", "--flag"]
    assert grouped(flags) == [
        ("beta", ["0.3"]),
        ("loss_type", ["sigmoid", "sft"]),
        ("a", ["b=c"]),
        ("flag", []),
    ]


@pytest.mark.parametrize(
    ("cards", "visible", "profile", "devices"),
    [
        ([], None, "cpu", "cpu"),
        (["24576, 8.9"], None, "local", "single_gpu"),
        (["81559, 9.0"], None, "gpu", "single_gpu"),
        (["81559, 9.0"] * 4, None, "gpu", "multi_gpu"),
        (["81559, 9.0"] * 4, "2", "gpu", "single_gpu"),
        (["81559, 9.0"] * 4, "", "cpu", "cpu"),
        (["81559, 9.0"], "-1", "cpu", "cpu"),
        (["15360, 7.5"], None, "turing", "single_gpu"),
        (["32768, 7.0"], None, "turing", "single_gpu"),
        (["24576, 8.0", "15360, 7.5"], None, "turing", "multi_gpu"),
        (["183359, 12.0"], None, "gpu", "single_gpu"),
    ],
)
def test_profile_and_devices_follow_from_the_cards(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cards: list[str], visible: str | None, profile: str, devices: str
) -> None:
    tools = folder / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f"echo {card}\n" for card in cards) + "exit 0\n")
    (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.chdir(folder)
    launches: list[Launch] = []
    monkeypatch.setattr(Launch, "run", lambda self: launches.append(self) or 0)
    assert launch.prepare("stand_in").run() == 0
    assert (launches[0].profile.stem, launches[0].accelerate.stem) == (profile, devices)
    arguments = launches[0]._arguments()
    assert ("--num_processes" in arguments) == (devices == "multi_gpu")
    if devices == "multi_gpu":
        assert arguments[arguments.index("--num_processes") + 1] == str(len(cards))


# Clear ends


def test_a_config_flag_is_refused_with_the_way_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(RecipeError, match="--profile FILE"):
        launch.prepare("stand_in", flags=["--config", "mine.yaml"])


@pytest.mark.parametrize(("text", "said"), [("- a\n- b\n", "holds a list"), ("a: [\n", "is not YAML")])
def test_a_broken_profile_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    monkeypatch.chdir(folder)
    Path("mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        launch.prepare("stand_in", profile="mine.yaml")


def test_an_unknown_profile_names_those_there_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(RecipeError, match="cpu, gpu, local, turing"):
        launch.prepare("stand_in", profile="gpus")


def test_an_accelerate_file_that_accelerate_refuses_is_exit_2(start: Callable, folder: Path) -> None:
    (folder / "odd.yaml").write_text("distributed_type: 'NO'\nnum_processes: 1\nno_such_key: 1\n")
    process = start("stand-in", "--accelerate", "odd.yaml")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert "no_such_key" in output
    assert "Traceback" not in output


# The YAML files


ACCELERATE_FILES = sorted((REPOSITORY / "recipes" / "accelerate").glob("*.yaml"))
PROFILES = sorted((REPOSITORY / "recipes" / "profiles").glob("*.yaml"))


def test_the_yaml_files_are_there() -> None:
    names = ["cpu", "cpu2", "fsdp2", "multi_gpu", "single_gpu", "zero2", "zero3"]
    assert [path.stem for path in ACCELERATE_FILES] == names
    assert [path.stem for path in PROFILES] == ["cpu", "gpu", "local", "turing"]


@pytest.mark.parametrize("path", ACCELERATE_FILES, ids=lambda path: path.stem)
def test_accelerate_accepts_each_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert isinstance(load_config_from_file(str(path)), ClusterConfig)
    parser = launch_command_parser()
    known = vars(parser.parse_args(["recipe.py"]))
    settings = yaml.safe_load(path.read_text())
    for section, prefix in (("fsdp_config", "fsdp_"), ("deepspeed_config", "")):
        unknown = {key for key in settings.get(section, {}) if key not in known or not key.startswith(prefix)}
        assert not unknown, f"accelerate launch has no {unknown}"
    arguments, _, _ = _validate_launch_command(
        parser.parse_args(["--config_file", str(path), "--num_processes", "2", "recipe.py"])
    )
    kinds = {name for name in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(arguments, name)}
    expected = {"cpu2": "multi_gpu", "multi_gpu": "multi_gpu", "fsdp2": "use_fsdp"}
    expected |= {"zero2": "use_deepspeed", "zero3": "use_deepspeed"}
    assert kinds == ({expected[path.stem]} if path.stem in expected else set())


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_holds_only_what_the_machine_dictates(path: Path) -> None:
    machine = {"use_cpu", "dtype", "bf16", "fp16", "activation_checkpointing", "dataloader_pin_memory"}
    machine |= {"tokens_per_step", "per_device_train_batch_size", "per_device_eval_batch_size"}
    settings = yaml.safe_load(path.read_text())
    assert settings
    assert set(settings) <= machine
    assert all("#" in line for line in path.read_text().splitlines()), "each line says why"


def test_the_cpu_profile_leaves_dtype_and_batch_size_alone() -> None:
    settings = yaml.safe_load((REPOSITORY / "recipes" / "profiles" / "cpu.yaml").read_text())
    assert settings["bf16"] is False
    assert not {"dtype", "per_device_train_batch_size"} & set(settings)
