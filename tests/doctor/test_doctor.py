"""The doctor finds what is wrong with a machine, names the remedy, and tells nothing private."""

import getpass
import json
import os
import platform
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from commands import RECIPES, REPOSITORY, run_command
from transformers import AutoConfig

from dpo_recipes.cli import main
from dpo_recipes.doctor import compute, speed
from dpo_recipes.doctor.machine import look_at_machine, look_at_versions
from dpo_recipes.doctor.recipes import _start_context, check_recipes
from dpo_recipes.doctor.report import Finding, Part, on_screen, scrub, write_report
from dpo_recipes.launch.launch import prepare
from dpo_recipes.shared_prefix import packing
from dpo_recipes.shared_prefix.trainer import SharedPrefixDPOTrainer

SECRET = "s3cr3t-value-of-a-token"
CPU = RECIPES / "profiles" / "cpu.yaml"


def silent(text):
    """Progress that nobody reads."""


# ---------------------------------------------------------------------------------------------- versions


def test_the_versions_of_this_environment_are_right():
    part = look_at_versions()
    names = [row[0] for row in part.rows]
    assert {"python", "trl", "torch", "transformers"} <= set(names)
    assert "pytest" not in names, "an extra is not required"
    assert part.findings == []
    assert {row[-1] for row in part.rows} <= {"ok", "ok, not the pin"}


@pytest.mark.parametrize(
    ("requirement", "pins", "what", "remedy"),
    [
        ("trl>=99", {"trl": "99.1"}, r"trl [\d.]+ installed, >=99 needed", "pip install -c constraints.txt 'trl'"),
        ("peft<0.1", {}, r"peft [\d.]+ installed, <0.1 needed", "pip install 'peft<0.1'"),
        ("no-such-package", {}, "no-such-package none installed, any version needed", "pip install 'no-such-package'"),
    ],
)
def test_a_wrong_version_is_found_with_its_remedy(requirement, pins, what, remedy):
    [finding] = look_at_versions([requirement, "numpy"], pins).findings
    assert re.fullmatch(what, finding.what)
    assert remedy in finding.remedy


def test_a_version_that_is_not_the_pin_is_named_and_right():
    part = look_at_versions(["numpy"], {"numpy": "0.0.1"})
    assert part.rows[-1][-1] == "ok, not the pin"
    assert part.findings == []


def test_an_old_python_is_found():
    [finding] = look_at_versions(["numpy"], {}, python="3.10.4").findings
    assert "3.11 or newer is needed" in finding.what


def test_the_machine_is_named_with_the_profile_that_would_be_chosen():
    rows = dict(look_at_machine(prepare("quickstart", profile="cpu")).rows)
    assert rows["profile"] == "cpu, accelerate file cpu"
    assert torch.__version__ in rows["torch"]
    assert "GiB free" in rows["memory"]


def test_cards_are_named_and_a_torch_that_sees_none_is_found(tmp_path, monkeypatch):
    """A script stands in for nvidia-smi of a machine with a card that this torch cannot use."""
    script = tmp_path / "nvidia-smi"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *compute_cap*) echo "23034, 8.9";; *) echo "NVIDIA L4, 580.65.06";; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    part = look_at_machine(prepare("quickstart"))
    rows = dict(part.rows)
    assert rows["card 0"] == "NVIDIA L4, 23,034 MiB, compute capability 8.9, driver 580.65.06"
    assert rows["profile"] == "local, accelerate file single_gpu"
    assert rows["micro-batch"] == "8,192 tokens, about 28 pairs as in hh-rlhf"
    decided = r"qwen2.5-1.5b with LoRA: tokens_per_step 8,192 with activation checkpointing on.*; tokens_per_step "
    assert re.match(
        decided + r"[\d,]+ \(auto\) with activation checkpointing on, .* of 24.2 GB", rows["memory decides"]
    )
    if not torch.cuda.is_available():
        assert "sees none" in part.findings[0].what
        assert "Install a torch" in part.findings[0].remedy


# ------------------------------------------------------------------------------------------------ privacy


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("There is no model in {home}/models/mine.", "There is no model in <path>"),
        ("FileNotFoundError: '{cwd}/a b/rows.jsonl'", "FileNotFoundError: '<path>'"),
        ("401 for https://user:pw@hub.example/api with {secret}", "401 for <path> with <secret>"),
        ("hf_abcdefghijklmnop was refused", "<secret> was refused"),
        ("run by {user} on {host}", "run by <name> on <name>"),
        ("Qwen/Qwen2.5-1.5B takes 300 tokens/s at 1/2", "Qwen/Qwen2.5-1.5B takes 300 tokens/s at 1/2"),
    ],
)
def test_a_text_is_scrubbed_of_what_is_private_and_of_nothing_else(text, clean, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setenv("WORD_API_KEY", "secret")
    names = dict(home=Path.home(), cwd=Path.cwd(), secret=SECRET, user=getpass.getuser(), host=platform.node())
    assert scrub(text.format(**names)).rstrip(".") == clean.rstrip(".")


def test_the_report_holds_nothing_private(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/some one")
    monkeypatch.setenv("USER", "someone")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    part = Part("Part", ["what", ""], [["someone's run", "/home/some one/x.yaml"]])
    part.findings.append(Finding(f"OSError: {SECRET} for {tmp_path}/rows.jsonl", f"Look at {Path.cwd()}/a.py."))
    files = write_report(tmp_path / "report.md", [part], "Doctor")
    assert [file.name for file in files] == ["report.md", "report.json"]
    for file in files:
        text = file.read_text()
        assert "OSError" in text
        for private in ("/home", "some one", "someone", SECRET, str(tmp_path), str(Path.cwd()), "rows.jsonl"):
            assert private not in text
    held = json.loads(files[1].read_text())
    assert held["parts"][0]["header"] == ["what", ""]
    assert held["parts"][0]["rows"] == [["<name>'s run", "<path>"]]


def test_a_table_is_aligned_and_folded_with_its_findings_below():
    rows = [["a", "1"], ["bb", "22"], ["c", "3"]]
    part = Part("Title", ["name", "n"], rows, [Finding("It is bad", "Mend it.")], fold=2)
    lines = ["Title", "  name  n     name  n", "  a     1     c     3", "  bb    22", "  ! It is bad. Mend it."]
    assert on_screen(part).splitlines() == lines


# --------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_as_exact_as_its_dtype(dtype):
    assert 0 < compute.product_error(dtype, "cpu") <= compute.LIMITS[dtype]


@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_attention_is_as_exact_as_its_dtype(dtype, window):
    assert 0 < compute.attention_error(dtype, "cpu", window=window) <= compute.LIMITS[dtype]


def test_a_layer_in_4_bits_computes_with_its_dequantised_weights():
    assert 0 < compute.four_bit_error(torch.bfloat16, "cpu") <= compute.LIMITS[torch.bfloat16]


def checked(dtype):
    return compute.check_compute(dtype, use_cpu=True, architectures=["llama"], say=silent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_machine_that_computes_right_has_no_findings(dtype):
    part = checked(dtype)
    assert part.findings == []
    own = [row[3] for row in part.rows if row[0].endswith(f"LoRA, {str(dtype)[6:]}")]
    assert [bool(cell) for cell in own] == [dtype != torch.float32], "TRL's own error stands beside ours"


def test_wrong_attention_is_found_and_named(monkeypatch):
    def wrong(query, key, value, plan, *, scale, window, softcap, right=packing.attend):
        return right(query, key, value, plan, scale=scale * (1.01 if query.dtype == torch.float32 else 1), **rest)

    rest = dict(window=None, softcap=None)
    monkeypatch.setattr(packing, "attend", wrong)
    monkeypatch.setattr(compute, "attend", wrong)
    monkeypatch.setattr(SharedPrefixDPOTrainer, "_compare_with_trl", lambda *_: None)  # which would refuse it first
    found = {finding.what.partition(":")[0] for finding in checked(torch.float32).findings}
    assert {"packed attention, float32", "shared prompts, llama, LoRA, float32"} <= found
    assert "matrix product, float32" not in found


def test_a_check_that_fails_is_a_finding_and_the_others_go_on(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setattr(compute, "four_bit_error", broken)
    part = checked(torch.float32)
    [finding] = part.findings
    assert finding.what.endswith("fails with RuntimeError: no kernel image is available")
    assert "bitsandbytes" in finding.remedy
    assert [row[-1] for row in part.rows].count("ok") == len(part.rows) - 1 > 3


# -------------------------------------------------------------------------------------------------- speed


def test_required_operations_are_those_worked_out_by_hand():
    sizes = dict(hidden_size=4, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    config = AutoConfig.for_model("qwen2", **sizes, intermediate_size=8, vocab_size=10)
    # A layer: q and o 2 x 16, k and v 2 x 4 x 2, MLP 3 x 32: 144 weights. 6 tokens: 3 + 2 + 1.
    # Queries x keys: (3 + 2)^2 / 2 + 1 x (3 + 1 / 2) = 16. The head scores 3 tokens.
    layers, attention, head = 2 * (2 * 144) * 6, 4 * 2 * 4 * 16, 2 * 4 * 10 * 3
    assert speed.required_flops(config, [(3, 2, 1)]) == 3 * layers + 4 * attention + 3 * head


def test_lengths_are_drawn_as_the_table_says():
    drawn = speed.draw_lengths(20_000, seed=0)
    for side, name in enumerate(("prompt", "chosen", "rejected")):
        values = torch.tensor([lengths[side] for lengths in drawn], dtype=torch.float)
        for quantile, tokens in zip(speed.QUANTILES[1:6], speed.LENGTHS[name][1:6], strict=True):
            assert values.quantile(quantile) == pytest.approx(tokens, rel=0.06, abs=1)
    assert max(p + max(c, r) for p, c, r in drawn) <= speed.MAX_LENGTH
    assert speed.draw_lengths(3, seed=1) == speed.draw_lengths(3, seed=1) != speed.draw_lengths(3, seed=2)


@pytest.mark.slow
def test_plain_trl_and_shared_prompts_are_timed_with_one_model(tmp_path):
    part = speed.check_speed(["tiny"], [1, 2], torch.float32, use_cpu=True, rounds=1, checkpointing=False, say=silent)
    assert [(row[1], row[2]) for row in part.rows] == [(n, kind) for n in "12" for kind in (speed.TRL, speed.OURS)]
    assert part.findings == []
    for row in part.rows:
        milliseconds, tokens, rate = (float(row[column].replace(",", "")) for column in (3, 4, 5))
        assert rate == pytest.approx(tokens / milliseconds * 1000, rel=0.05)
        assert 0 < float(row[6].rstrip("%")) < 100
        assert bool(row[8]) == (row[2] == speed.TRL)


# ------------------------------------------------------------------------------------------------ recipes


@pytest.mark.slow
def test_recipes_pass_or_give_their_first_error_in_one_line(tmp_path):
    right = RECIPES / "hh_rlhf_reward.py"
    code = right.read_text()
    faults = {
        "raises": code.replace("    start_run(", "    raise OSError('cannot read\\n  the disk')\n    start_run("),
        "refuses": code.replace("    # Data\n", "    # Data\n    betta=1,\n"),
        "no_recipe": "x = 1\n",
    }
    for name, text in faults.items():
        (tmp_path / f"{name}.py").write_text(text)
    recipes = [right, *(tmp_path / f"{name}.py" for name in faults)]
    part = check_recipes(recipes, CPU, tmp_path / "work", use_cpu=True, say=silent)
    assert {row[0]: row[-1] for row in part.rows} == {right.stem: "ok"} | dict.fromkeys(faults, "failed")
    found = sorted(finding.what for finding in part.findings)
    assert found[0].startswith("no_recipe under cpu: RecipeError: no_recipe.py has no RECIPE")
    assert found[1] == "raises under cpu: OSError: cannot read the disk"
    assert found[2].startswith("refuses under cpu: RECIPE has keys that TRL does not know: --betta")
    assert "dpo-recipes train raises --profile cpu" in part.findings[-1].remedy + part.findings[-2].remedy


# ---------------------------------------------------------------------------------------------- the verb


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "report.txt"], "Give it a name that ends in .md"),
        (["--profile", "nothing"], "recipes/profiles has no nothing"),
        (["--model", "gpt-5"], "Name one of tiny, qwen2.5-0.5b"),
    ],
)
def test_a_wrong_call_ends_with_status_2(flags, message, capsys):
    assert main(["doctor", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("length", "method"), [(71, "forkserver"), (72, "spawn")])
def test_a_deep_temporary_folder_has_no_room_for_the_forkservers_socket(length, method):
    assert _start_context("/" + "x" * (length - 1)).get_start_method() == method


@pytest.mark.slow
def test_the_whole_is_right_here_and_its_file_can_be_shared(tmp_path, dpo_recipes):
    home = tmp_path / "home of somebody"
    home.mkdir()
    (tmp_path / "tmp").mkdir()
    private = {"HOME": str(home), "USER": "somebody", "HF_TOKEN": SECRET, "TMPDIR": str(tmp_path / "tmp")}
    call = (dpo_recipes, "doctor", "--quick", "--profile", "cpu", "--out", "report.md")
    result = run_command(*call, cwd=tmp_path, timeout=1800, **private)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "All is right" in result.stdout
    assert f"of {len([*RECIPES.glob('*.py')])})" in result.stderr, "progress"
    names = {path.stem for path in RECIPES.glob("*.py")}
    held = json.loads((tmp_path / "report.json").read_text())
    assert {row[0] for row in held["parts"][-1]["rows"]} == names
    for text in (result.stdout.partition("Wrote")[0], *(file.read_text() for file in tmp_path.glob("report.*"))):
        for words in (str(tmp_path), str(REPOSITORY), "somebody", SECRET):
            assert words not in text
    assert [path for path in (tmp_path / "tmp").iterdir() if "doctor" in path.name] == []
    assert [path for path in home.rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_an_interrupt_ends_it_at_once_and_leaves_nothing(tmp_path, dpo_recipes):
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [dpo_recipes, "doctor", "--quick", "--profile", "cpu"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        assert any("(1 of 2" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert [path for path in (tmp_path / "tmp").iterdir() if "doctor" in path.name] == []
    session = ["ps", "-o", "pid=,args=", "-s", str(process.pid)]
    for _ in range(30):  # the server of the forks ends by itself, once this process is gone
        left = subprocess.run(session, capture_output=True, text=True).stdout
        if "python" not in left:
            break
        time.sleep(1)
    assert "python" not in left
