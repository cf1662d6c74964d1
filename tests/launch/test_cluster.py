"""The files for clusters: they parse, name what exists, and a job under a real SLURM goes on after a preemption."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import RECIPES, REPOSITORY

from dpo_recipes.catalog import find_recipe
from dpo_recipes.cli import build_parser
from dpo_recipes.doctor.miniature import miniature_flags

CLUSTER = RECIPES / "cluster"


def test_the_scripts_are_bash():
    run = yaml.safe_load((CLUSTER / "sky.yaml").read_text())["run"]
    for script in ((CLUSTER / "slurm.sh").read_text(), run):
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""


@pytest.mark.parametrize("name", ["slurm.sh", "sky.yaml"])
def test_the_flags_for_machines_are_the_launchers(name):
    flags = re.findall(r"(--(?:machines|rank|main)) ", (CLUSTER / name).read_text())
    assert flags == ["--machines", "--rank", "--main"]
    words = ["train", "hh-rlhf-lora", "--machines", "2", "--rank", "1", "--main", "host:1"]
    assert build_parser().parse_known_args(words)[1] == []


def test_the_sky_file_names_a_recipe():
    settings = yaml.safe_load((CLUSTER / "sky.yaml").read_text())
    assert find_recipe(settings["envs"]["RECIPE"]).is_file()
    assert "--resume_from_checkpoint true" in settings["run"]


def test_the_image_is_built_from_the_constraints():
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT"}
    text = re.sub(r"\\\n", " ", (CLUSTER / "Containerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert {line.split()[0] for line in lines} == known
    assert "constraints.txt" in text


@pytest.mark.faults
def test_a_job_that_slurm_stops_queues_again_and_goes_on(tmp_path):
    """USR1 comes to the batch script, as it does before the end of a job's time."""
    if not shutil.which("sbatch") or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no SLURM runs here")
    flags = [*miniature_flags(RECIPES / "hh_rlhf_lora.py", tmp_path), "--profile", "cpu", "--max_steps", "120"]
    script = [CLUSTER / "slurm.sh", "hh-rlhf-lora", *flags, "--save_steps", "100", "--output_dir", "run"]
    environment = os.environ | {"DPO_RECIPES": str(Path(sys.executable).parent / "dpo-recipes")}
    call = ["sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=1", *map(str, script)]
    job = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    def wait_for(text):
        end, log = time.monotonic() + 400, tmp_path / f"slurm-{job}.log"
        while text not in (said := log.read_text() if log.exists() else "") and time.monotonic() < end:
            time.sleep(0.5)
        assert text in said, said

    try:
        wait_for("     10  loss")
        subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)
        wait_for("Continue with --resume_from_checkpoint true.")
        wait_for("Resuming from run/checkpoint-")
        wait_for("report.html")
    finally:
        subprocess.run(["scancel", job], check=True)
    assert (tmp_path / "run" / "done.json").exists()
    assert shlex.split((tmp_path / f"slurm-{job}.log").read_text().partition("Training ")[2])[0].isdigit()
    assert REPOSITORY in CLUSTER.parents
