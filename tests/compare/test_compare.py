"""The comparison: which stages run, on which data, within which budget, and when they run again."""

import contextlib
import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from commands import RECIPES, run_command
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, RewardConfig, RLOOConfig

from dpo_recipes.cli import main
from dpo_recipes.compare import budget, plan, stages
from dpo_recipes.compare import compare as comparing
from dpo_recipes.dataset_adapters.ledger import Ledger
from dpo_recipes.errors import RecipeError
from dpo_recipes.evaluate import answers
from dpo_recipes.evaluate.measures import columns
from dpo_recipes.flags import grouped
from dpo_recipes.launch import processes
from dpo_recipes.launch.launch import Launch
from dpo_recipes.loading import keep_part, prompt_hashes
from dpo_recipes.models.open import open_model
from dpo_recipes.ppo import PPOConfig
from dpo_recipes.recipe import RecipeArguments
from dpo_recipes.rounds import RoundsConfig
from dpo_recipes.runs import model_card as record

STAND_IN = '''"""A stand-in that trains nothing, and leaves what a run leaves."""
import json, os, sys
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(flags["--output_dir"])
folder.mkdir(parents=True, exist_ok=True)
begun = "resumed" if "--resume_from_checkpoint" in flags else "replaced" if "--overwrite" in flags else "begun"
with open("log", "a") as file:
    file.write(f"{folder.name} {begun}\\n")
request = json.dumps({"request": os.environ["DPO_RECIPES_REQUEST"]})
(folder / "settings.json").write_text(request)
ending = Path(f"end {folder.name}")
if ending.exists():
    sys.exit(int(ending.read_text()))
(folder / "done.json").write_text(request)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "profiles").mkdir(parents=True)
    (tmp_path / "recipes" / "profiles" / "cpu.yaml").write_text("use_cpu: true\n")
    for kind in ("lora", "reward", "rounds", "ppo", "rloo"):
        (tmp_path / "recipes" / f"mine_{kind}.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def recipe_of(kind, **flags):
    """A recipe of the folder as `read_recipes` would have it, with the settings that the plan reads."""
    file = Path("recipes") / ("mine_lora.py" if kind == "dpo" else f"mine_{kind}.py")
    words = tuple(word for key, value in flags.items() for word in (f"--{key}", str(value)))
    there = Launch(file, Path("recipes/profiles/cpu.yaml"), Path("recipes/profiles/cpu.yaml"), flags=words)
    return plan.Recipe(kind, {}, there, None, None, SimpleNamespace(model_name_or_path="a-model"))


def planned(*, betas=("0.1",), seeds=(0,), judge=True, root="out", **flags_of):
    kinds = ["dpo", "reward", "ppo", *(kind for kind in ("rounds", "rloo") if kind in flags_of)]
    recipes = {kind: recipe_of(kind, **flags_of.get(kind, {})) for kind in kinds}
    if judge:
        recipes["judge"] = recipes["reward"]
    return plan.plan_stages(
        recipes, betas=betas, seeds=seeds, root=Path(root), amounts={"rounds": 352, "ppo": 176, "rloo": 22}
    )


def flags(stage):
    return {name: " ".join(values) for name, values in grouped(stage.launch.flags)}


@pytest.fixture
def ran(folder, monkeypatch):
    """Runs the stages with the stand-in, without accelerate; returns what ran."""

    def run_directly(arguments, environment):
        at = next(index for index, word in enumerate(arguments) if word.endswith(".py"))
        call = [sys.executable, arguments[at], *arguments[at + 1 :]]
        return subprocess.run(call, env=environment, check=False).returncode

    monkeypatch.setattr(processes, "supervise", run_directly)

    def call(stages_to_run):
        Path("log").write_text("")
        statuses = stages.run_stages(stages_to_run, stages.Clock())
        return statuses, Path("log").read_text().splitlines()

    return call


@pytest.mark.parametrize("is_there", [True, False])
def test_a_model_that_a_flag_names_is_no_stage_of_a_comparison(folder, is_there):
    shutil.copy("recipes/mine_lora.py", "recipes/mine_sft.py")
    if is_there:
        Path("outputs/mine_sft").mkdir(parents=True)
        Path("outputs/mine_sft/config.json").write_text("{}")
    kinds = [stage.kind for stage in planned(dpo={"model_name_or_path": "outputs/mine_sft"})]
    assert ("sft" in kinds) != is_there


def test_a_run_that_is_no_comparisons_is_never_replaced(ran, folder):
    stage = planned()[0]
    stage.folder.mkdir(parents=True)
    (stage.folder / "settings.json").write_text(json.dumps({"request": "of somebody's own training"}))
    assert ran([stage]) == ({stage.name: 0}, [f"{stage.name} begun"])  # where the run itself refuses
    assert not (stage.folder / "stage.json").exists()


def test_every_algorithm_is_trained_with_every_beta_and_seed_on_the_same_data(folder):
    grid = planned(betas=("0.1", "0.3"), seeds=(0, 1), rloo={}, rounds={})
    names = [stage.name for stage in grid]
    one = ["dpo-0.1-0", "dpo-0.3-0", "reward-0"]
    one += [f"{kind}-{beta}-0" for kind in ("rounds", "ppo", "rloo") for beta in ("0.1", "0.3")]
    assert names == ["judge", *one, *(name[:-1] + "1" for name in one)]
    learners = grid[1:]
    assert {flags(stage)["part"] for stage in learners} == {"learn"}
    assert {stage.name: flags(stage)["seed"] for stage in learners} == {name: name[-1] for name in names[1:]}
    tried = {kind: [(flags(s)["beta"], flags(s)["seed"]) for s in grid if s.kind == kind] for kind in plan.ALGORITHMS}
    assert tried["dpo"] == tried["rounds"] == tried["ppo"] == tried["rloo"]
    assert [flags(stage).get("max_steps") for stage in grid[3:9]] == [None, None, None, "176", "176", "22"]
    assert [flags(stage).get("num_prompts") for stage in grid[3:7]] == [None, "352", "352", None]


def test_the_judge_is_another_model_than_the_one_that_ppo_raises(folder):
    grid = {stage.name: stage for stage in planned()}
    assert flags(grid["judge"])["part"] == "judge"
    assert flags(grid["judge"])["seed"] not in {flags(grid["reward-0"])["seed"], flags(grid["ppo-0.1-0"])["seed"]}
    assert flags(grid["ppo-0.1-0"])["reward_model_name_or_path"] == str(grid["reward-0"].folder)
    assert grid["judge"].folder != grid["reward-0"].folder


def test_with_an_exact_reward_no_judge_is_trained_and_all_pairs_are_learned_from(folder):
    grid = planned(judge=False)
    assert [stage.name for stage in grid] == ["dpo-0.1-0", "reward-0", "ppo-0.1-0"]
    assert not any("part" in flags(stage) for stage in grid)


def test_a_finished_stage_is_not_run_again_and_an_unfinished_one_goes_on(ran):
    statuses, log = ran(planned())
    assert set(statuses.values()) == {0}
    assert log == [f"{name} begun" for name in ("judge", "dpo-0.1-0", "reward-0", "ppo-0.1-0")]
    Path("out/reward-0/done.json").unlink()
    assert ran(planned()) == (statuses, ["reward-0 resumed"])
    assert ran(planned()) == (statuses, [])


@pytest.mark.slow
def test_a_changed_setting_runs_again_what_depends_on_it_and_nothing_else(ran):
    ran(planned())
    assert ran(planned(ppo={"learning_rate": 1e-4}))[1] == ["ppo-0.1-0 replaced"]
    changed = {"ppo": {"learning_rate": 1e-4}, "reward": {"learning_rate": 1e-4}}
    assert ran(planned(**changed))[1] == ["judge replaced", "reward-0 replaced", "ppo-0.1-0 replaced"]
    assert ran(planned(betas=("0.1", "0.3"), **changed))[1] == ["dpo-0.3-0 begun", "ppo-0.3-0 begun"]
    assert ran(planned(**changed))[1] == []


def test_a_stage_that_was_interrupted_with_other_settings_begins_anew(ran):
    Path("end ppo-0.1-0").write_text("1")
    ran(planned())
    Path("end ppo-0.1-0").unlink()
    # The request of PPO's own launch is the same; the reward model that it would go on with is another.
    statuses, log = ran(planned(reward={"learning_rate": 1e-4}))
    assert log[-1] == "ppo-0.1-0 replaced"
    assert statuses["ppo-0.1-0"] == 0


def test_a_failed_stage_leaves_the_others_and_what_needs_it_is_not_begun(ran):
    Path("end reward-0").write_text("1")
    statuses, log = ran(planned(seeds=(0, 1)))
    assert statuses["reward-0"] == 1
    assert statuses["ppo-0.1-0"] is None
    assert not any(line.startswith("ppo-0.1-0") for line in log)
    assert {statuses[name] for name in ("judge", "dpo-0.1-0", "dpo-0.1-1", "reward-1", "ppo-0.1-1")} == {0}


@pytest.mark.parametrize("status", [130, 143])
def test_a_stopped_stage_stops_the_comparison(ran, status, capsys):
    Path("end reward-0").write_text(str(status))
    statuses, log = ran(planned(seeds=(0, 1)))
    assert [*statuses.items()][-1] == ("reward-0", status)
    assert log[-1] == "reward-0 begun"
    assert "The same command goes on there." in capsys.readouterr().out
    Path("end reward-0").unlink()
    assert ran(planned())[1] == ["reward-0 resumed", "ppo-0.1-0 begun"]


def test_progress_and_the_time_left_are_told_by_what_the_stages_took(ran, capsys):
    clock = stages.Clock()
    clock.took = {"dpo": [60.0], "reward": [120.0]}
    clock.since -= 180
    # PPO has not been measured: 4 times the unit, which is the mean of 60 and 120.
    grid = planned()
    assert clock.left(grid[3:]) == "; 3 min so far, about 6 min left"
    assert clock.left(grid[1:]) == "; 3 min so far, about 9 min left"
    ran(grid)
    assert clock.left(grid) == "; 3 min so far, about 0 min left"
    assert "Stage 4 of 4: ppo-0.1-0" in capsys.readouterr().out


@pytest.fixture(scope="module")
def dpo_launch():
    return Launch(RECIPES / "quickstart.py", RECIPES / "profiles" / "cpu.yaml", RECIPES / "accelerate" / "cpu.yaml", ())


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("--beta 0.3", "--betas 0.05,0.1"),
        ("--seed 3", "--seeds 0,1,2"),
        ("--ppo.seed 3", "--seeds 0,1,2"),
        ("--part learn", "the comparison divides the data"),
        ("--max_steps 3", "Give --dpo.max_steps"),
        ("--ppo.max_steps 3", "Give --dpo.max_steps"),
        ("--reward_model_name_or_path x", "the comparison trains one"),
        ("--overwrite true", "remove the folder"),
        ("--budget samples", "all others sample as many answers"),
        ("--rounds.num_prompts 64", "all others sample as many answers"),
        ("--ppo.max_prompt_length 64", "--max_length: all learn from the prompts"),
        ("--learning_rat 1e-5", "--learning_rat is a setting of none of the recipes dpo"),
        ("--dpo.center_rewards_coefficient 0.1", "--dpo.center_rewards_coefficient is a setting of none"),
        ("--learning_rate fast", "invalid float value: 'fast'"),
    ],
)
def test_a_flag_that_is_the_comparisons_own_or_nobodys_is_refused(dpo_launch, given, reason, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dpo-recipes"])
    try:
        with pytest.raises(RecipeError) as refused:
            plan.read_recipes(dpo_launch, ["dpo"], flags=given.split())
    except SystemExit:  # argparse's own way out
        assert reason in capsys.readouterr().err
    else:
        assert reason in str(refused.value)


def test_a_flag_goes_to_every_recipe_that_knows_it_or_to_one(dpo_launch, monkeypatch):
    monkeypatch.setattr("sys.argv", ["dpo-recipes"])
    given = "--max_length 200 --reward.learning_rate 2e-4 --dpo.learning_rate 3e-4 --dpo.max_steps 7 --lora_r 8"
    recipes = plan.read_recipes(dpo_launch, ["dpo", "ppo"], flags=given.split())
    assert {*recipes} == {"dpo", "reward", "ppo"}  # the quickstart has an exact judge
    rates = {kind: recipe.training_args.learning_rate for kind, recipe in recipes.items()}
    assert (rates["dpo"], rates["reward"]) == (3e-4, 2e-4)
    assert {recipes[kind].training_args.max_length for kind in ("dpo", "reward")} == {200}
    assert {recipe.model_args.lora_r for recipe in recipes.values()} == {8}
    assert (recipes["dpo"].training_args.max_steps, recipes["reward"].training_args.max_steps) == (7, -1)
    assert "max_length" not in dict(grouped(recipes["ppo"].launch.flags))
    assert recipes["ppo"].script_args.max_pair_length == 200
    assert {recipe.model_args.model_name_or_path for recipe in recipes.values()} == {"outputs/quickstart_sft"}


def test_the_same_lora_preset_token_limit_and_sampling_are_the_recipes_own(dpo_launch, monkeypatch):
    """What the recipes of the repository say without a flag is a fair match already."""
    monkeypatch.setattr("sys.argv", ["dpo-recipes"])
    for name in ("quickstart", "hh_rlhf_lora"):
        there = replace(dpo_launch, recipe=RECIPES / f"{name}.py")
        recipes = plan.read_recipes(there, ["dpo", "rounds", "ppo", "rloo"], flags=[])
        presets = [
            {key: getattr(recipe.model_args, key) for key in budget.PRESET if hasattr(recipe.model_args, key)}
            for recipe in recipes.values()
        ]
        assert all(preset == presets[0] for preset in presets)
        assert presets[0]["use_peft"]
        online = [recipes[kind].training_args for kind in plan.ONLINE]
        assert len({(args.temperature, args.max_completion_length) for args in online}) == 1
        assert ("judge" in recipes) == (name == "hh_rlhf_lora")


def test_each_recipe_is_executed_once(dpo_launch, monkeypatch):
    monkeypatch.setattr("sys.argv", ["dpo-recipes"])
    executed, original = [], runpy.run_path
    monkeypatch.setattr(runpy, "run_path", lambda file: executed.append(Path(file).stem) or original(file))
    recipes = plan.read_recipes(replace(dpo_launch, recipe=RECIPES / "hh_rlhf_lora.py"), ["dpo", "ppo"], flags=[])
    assert {*recipes} == {"dpo", "ppo", "reward", "judge"}
    assert sorted(executed) == ["hh_rlhf_lora", "hh_rlhf_ppo", "hh_rlhf_reward"]


def test_missing_siblings_are_named(folder, monkeypatch):
    Path("recipes/mine_ppo.py").unlink()
    Path("recipes/mine_reward.py").unlink()
    with pytest.raises(
        RecipeError, match=r"mine_lora_reward\.py or mine_reward\.py, mine_lora_ppo\.py or mine_ppo\.py"
    ):
        plan.find_siblings(Path("recipes/mine_lora.py"), ["dpo", "reward", "ppo"])
    assert plan.find_siblings(Path("recipes/mine_lora.py"), ["rloo"])["rloo"] == Path("recipes/mine_rloo.py")


def test_a_recipe_without_siblings_ends_in_one_line_and_status_2(folder, capsys):
    Path("recipes/alone.py").write_text((RECIPES / "hh_rlhf_lora.py").read_text())
    with pytest.raises(SystemExit) as ended:
        main(["compare", "alone", "--profile", "cpu"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "alone_reward.py" in error
    assert "alone_ppo.py" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "words", [["--methods", "sft"], ["--methods", "dpo,gpt"], ["--betas", "0.1,0.10"], ["--seeds", "0,x"]]
)
def test_a_call_that_makes_no_sense_is_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compare", "quickstart", "--profile", "cpu", *words])
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err


def budgeted(tmp_path, *, epochs=2.0, max_steps=-1):
    """Recipes of 704 pairs, 16 an update, and rollouts of 64 answers in updates of 32."""
    common = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False)
    offline = dict(per_device_train_batch_size=16, num_train_epochs=epochs, max_steps=max_steps)
    online = dict(per_device_train_batch_size=16, generation_batch_size=64)
    arguments = {
        "dpo": DPOConfig(**common, **offline),
        "reward": RewardConfig(**common, **offline | {"num_train_epochs": 2.0}),
        "ppo": PPOConfig(**common, **online, num_iterations=4),
        "rloo": RLOOConfig(**common, **online, num_generations=4),
        "rounds": RoundsConfig(**common, **offline, num_rounds=3, num_generations=4),
    }
    pairs = {"dpo": 16, "reward": 16, "ppo": 32, "rloo": 64, "rounds": 16}
    return {
        kind: replace(recipe_of(kind), training_args=args, script_args=RecipeArguments(pairs_per_update=pairs[kind]))
        for kind, args in arguments.items()
    }


def test_equal_samples_are_as_many_answers_as_dpo_sees_pairs(folder, tmp_path):
    recipes = budgeted(tmp_path)
    amount = partial(budget.amount_within, recipes=recipes, pairs=704)
    # 704 pairs twice: 1,408 answers are 22 rollouts of 64; PPO's are 2 updates of 32 each, 4 times.
    assert amount(recipes["ppo"]) == 22 * 2 * 4
    assert amount(recipes["rloo"]) == 22
    assert amount(recipes["rounds"]) == 1408 / 4
    said = budget.budget_in_words(recipes, 704, {"rounds": 352, "ppo": 22 * 2 * 4, "rloo": 22})
    assert "DPO sees 1,408 pairs a seed, of 704 different ones" in said
    assert "DPO in rounds samples 1,408 answers, 4 to a prompt, in 3 rounds; PPO samples 1,408 answers" in said
    # 160 pairs: three whole rollouts, the third not full; rounds sample as many answers as PPO.
    fewer = recipes | {"dpo": budgeted(tmp_path, max_steps=10)["dpo"]}
    amount = partial(budget.amount_within, recipes=fewer, pairs=704)
    assert amount(recipes["ppo"]) == 3 * 2 * 4
    assert amount(recipes["rounds"]) == 192 / 4
    del fewer["ppo"]
    assert amount(recipes["rounds"]) == 168 / 4  # whole prompts in each of three rounds
    fewer = recipes | {"dpo": budgeted(tmp_path, max_steps=3)["dpo"]}
    with pytest.raises(RecipeError, match="DPO sees 48 pairs, and one rollout of ppo has 64 answers"):
        budget.amount_within(recipes["ppo"], recipes=fewer, pairs=704)


def test_rounds_that_nobody_asked_for_are_left_out_if_there_is_no_recipe(folder, monkeypatch, capsys):
    assert plan._without_missing_rounds(Path("recipes/mine_lora.py"), ["dpo", "rounds"]) == ["dpo", "rounds"]
    Path("recipes/mine_rounds.py").unlink()
    assert plan._without_missing_rounds(Path("recipes/mine_lora.py"), ["dpo", "rounds", "ppo"]) == ["dpo", "ppo"]
    assert "no recipe for DPO in rounds beside mine_lora.py" in capsys.readouterr().out


def test_unequal_numbers_of_scored_answers_are_told(tmp_path, folder):
    online = {"updates": 176, "start_hash": "s"}
    own = {"pairs_per_update": 32, "num_iterations": 4, "generation_batch_size": 64, "num_generations": 4}
    stages = [finished(tmp_path, f"{kind}-0.1-0", settings=own) for kind in ("dpo", "rounds", "ppo")]
    (stages[2].folder / "done.json").write_text(json.dumps(online))
    account = tmp_path / "rounds-0.1-0" / "round-1" / "round.json"
    account.parent.mkdir()
    for scored, held in ((1408, True), (1348, True), (704, False)):
        account.write_text(json.dumps({"round": 1, "answers": scored, "updates": 22}))
        checks = budget.check_match(stages, **MATCH)
        assert {check["held"] for check in checks if "scored as many answers" in check["detail"]} == {held}
        assert sum(not check["held"] for check in checks) == (not held)


def test_the_parts_share_no_prompt_and_are_all_there_is():
    rows = [{"prompt": [{"role": "user", "content": f"Question {n % 300}?"}], "n": n} for n in range(400)]
    pairs = Dataset.from_list(rows)
    with Ledger() as ledger:
        ledger.record("adapter", "train", came=400, kept=400, new=True)
        learn = keep_part(pairs, "learn")
    judge = keep_part(pairs, "judge")
    assert sorted([*learn["n"], *judge["n"]]) == list(range(400))
    assert not {*prompt_hashes(learn)} & {*prompt_hashes(judge)}
    assert 0.28 < len(judge) / 400 < 0.39  # a third
    account = ledger.accounts["train"]
    assert account.kept == len(learn)
    assert account.dropped["other_part"].count == len(judge)
    assert account.adds_up()
    assert keep_part(pairs, None) is pairs


def test_a_prompt_keeps_its_part_when_its_oldest_turns_go():
    turns = [
        [{"role": role, "content": f"{role} {n}"} for n in range(n, n + 2) for role in ("user", "assistant")][:3]
        for n in range(60)
    ]
    whole = keep_part(Dataset.from_dict({"prompt": turns, "n": list(range(60))}), "judge")
    short = keep_part(Dataset.from_dict({"prompt": [prompt[2:] for prompt in turns], "n": list(range(60))}), "judge")
    assert whole["n"][:] == short["n"][:]
    assert 5 < len(whole) < 40


def test_each_part_is_measured_with_the_settings_of_the_recipe(monkeypatch):
    measured = []

    def measure(load_pairs, script_args, training_args, tokenizer):
        measured.append((script_args.part, script_args.settings["model_revision"]))
        rows = {"train": {"prompt": [script_args.part]}, "test": {"prompt": ["held out"]}}
        return SimpleNamespace(pairs={split: Dataset.from_dict(columns) for split, columns in rows.items()})

    monkeypatch.setattr(comparing, "measure_pairs", measure)
    monkeypatch.setattr(comparing, "load_tokenizer", lambda *_: None)
    script_args = RecipeArguments(dataset_name="rows.jsonl")
    script_args.settings = {"model_revision": "v2"}
    comparing._divide(plan.Recipe("dpo", {"load_pairs": None}, None, script_args, None, None), with_judge=True)
    assert measured == [("learn", "v2"), ("judge", "v2")]
    assert script_args.part is None


def test_parts_that_share_a_prompt_stop_the_comparison():
    one, two, three = (Dataset.from_dict({"prompt": prompts}) for prompts in (["a", "b"], ["c"], ["d", "b"]))
    comparing.check_parts({"learn": one, "judge": two, "test": two.select([])})
    with pytest.raises(RuntimeError, match="1 prompts are in the parts learn and test"):
        comparing.check_parts({"learn": one, "judge": two, "test": three})
    with pytest.raises(RuntimeError, match="1 prompts are in the parts learn and judge"):
        comparing.check_parts({"learn": one, "judge": three, "test": two})


def finished(tmp_path, name, *, prompts="p", start="s", settings=()):
    kind, _, rest = name.partition("-")
    beta, _, seed = rest.rpartition("-")
    folder = tmp_path / name
    folder.mkdir()
    preset = {"use_peft": True, "lora_r": 16, "temperature": 1.0, "max_completion_length": 72} | dict(settings)
    (folder / "settings.json").write_text(json.dumps(preset))
    (folder / "preflight.json").write_text(json.dumps({"prompts": {"train": prompts}}))
    (folder / "done.json").write_text(json.dumps({"start_hash": start}))
    return plan.Stage(
        kind, name, recipe_of(kind if kind == "dpo" else "ppo").launch, folder, (), beta or None, int(seed or 0)
    )


MATCH = dict(betas=["0.1"], prompts={"learn": "p", "judge": "j"}, sampling={"temperature": 1.0, "max_new_tokens": 72})


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, None),
        ({"start": "other"}, "All started from the same weights."),
        ({"settings": {"lora_r": 8}}, "All were trained with the same LoRA settings."),
        ({"prompts": "other"}, "All learned from the same prompts, except ppo-0.1-0."),
        ({"settings": {"temperature": 0.7}}, "All answered the same prompts, by the temperature"),
        ({"settings": {"max_completion_length": 64}}, "All answered the same prompts, by the temperature"),
    ],
    ids=str,
)
def test_what_makes_the_match_unequal_is_found_in_what_the_runs_say(tmp_path, folder, changes, broken):
    stages = [finished(tmp_path, "dpo-0.1-0"), finished(tmp_path, "ppo-0.1-0", **changes)]
    checks = budget.check_match(stages, **MATCH)
    assert len(checks) == 5
    assert [check["detail"] for check in checks if not check["held"]] == [
        check["detail"] for check in checks if broken and check["detail"].startswith(broken)
    ]
    assert all(check["held"] for check in checks) == (broken is None)


def test_different_initial_models_of_the_hub_are_told(tmp_path, folder):
    """done.json has no hash of them."""
    stages = [
        finished(tmp_path, name, start=None, settings={"model_name_or_path": model})
        for name, model in (("dpo-0.1-0", "org/one"), ("ppo-0.1-0", "org/other"))
    ]
    [broken] = [check for check in budget.check_match(stages, **MATCH) if not check["held"]]
    assert broken["detail"] == "All started from the same weights."
    assert all(check["held"] for check in budget.check_match(stages[:1] * 2, **MATCH))


def test_an_unequal_tuning_budget_is_told(tmp_path, folder):
    stages = [finished(tmp_path, name) for name in ("dpo-0.1-0", "dpo-0.3-0", "ppo-0.1-0")]
    [broken] = [check for check in budget.check_match(stages, **MATCH) if not check["held"]]
    assert broken["detail"].startswith("All had the same tuning budget")


def test_a_judge_that_saw_the_learners_prompts_is_no_judge(tmp_path, folder):
    runs = [finished(tmp_path, "dpo-0.1-0"), finished(tmp_path, "judge", prompts="j")]
    assert budget.check_match(runs, **MATCH)[-1]["held"]
    (tmp_path / "judge" / "model.safetensors").write_bytes(b"weights")
    raised = record.weights_hash(str(tmp_path / "judge"))
    ppo = finished(tmp_path, "ppo-0.1-0")
    for hashes, alike in (["other"], False), ([raised], True):
        (ppo.folder / "done.json").write_text(json.dumps({"start_hash": "s", "reward_model_hashes": hashes}))
        with pytest.raises(RuntimeError, match="cannot judge") if alike else contextlib.nullcontext():
            budget.check_match([*runs, ppo], **MATCH)
    (tmp_path / "judge" / "preflight.json").write_text(json.dumps({"prompts": {"train": "p"}}))
    with pytest.raises(RuntimeError, match="learned from other prompts than the judge's part"):
        budget.check_match(runs, **MATCH)


PROMPTS = [[{"role": "user", "content": text}] for text in ("Hi", "What is tea made of, pray?", "Why?")]


@pytest.fixture
def two_models(tmp_path, tiny_model):
    """A start and a run with other weights, and pairs."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "run")
    _, tokenizer = open_model(str(tiny_model))
    tokenizer.save_pretrained(tmp_path / "run")
    pairs = [
        {"prompt": prompt, "chosen": turn(f"Yes {n}"), "rejected": turn(f"No, {n}")} for n, prompt in enumerate(PROMPTS)
    ]
    return str(tiny_model), str(tmp_path / "run"), Dataset.from_list(pairs)


def turn(text):
    return [{"role": "assistant", "content": text}]


def answered(two_models, folder, **changes):
    start, run, pairs = two_models
    entries = [answers.Entry("sft-0", start, 0, "a"), answers.Entry("dpo-0", run, 0, "b")]
    given = (
        dict(prompts=PROMPTS, pairs=pairs, sampling={"temperature": 1.0, "max_new_tokens": 8}, folder=folder) | changes
    )
    return answers.answer_all(entries, start, **given)


def test_answers_are_the_same_with_and_without_an_interruption(two_models, tmp_path):
    whole = answered(two_models, tmp_path / "whole")
    answered(two_models, tmp_path / "cut")
    (tmp_path / "cut" / "dpo-0.json").write_text('{"key": "half')  # as no write of ours leaves it
    assert answered(two_models, tmp_path / "cut") == whole
    kept = (tmp_path / "whole" / "dpo-0.json").stat().st_mtime_ns
    assert answered(two_models, tmp_path / "whole") == whole
    assert (tmp_path / "whole" / "dpo-0.json").stat().st_mtime_ns == kept  # not asked again
    other = answered(two_models, tmp_path / "whole", sampling={"temperature": 1.0, "max_new_tokens": 4})
    assert max(answer["tokens"] for answer in other["dpo-0"]["answers"]) <= 4


def test_the_start_is_at_no_distance_from_itself_and_a_changed_model_is(two_models, tmp_path):
    found = answered(two_models, tmp_path, prompts=PROMPTS * 20)
    assert all(answer["policy"] == answer["start"] for answer in found["sft-0"]["answers"])
    apart = [answer["policy"] - answer["start"] for answer in found["dpo-0"]["answers"]]
    assert sum(apart) / len(apart) > 0.1
    assert found["sft-0"]["chosen"] != found["dpo-0"]["chosen"]
    judge = answers.exact_judge(lambda prompt, text: len(text))
    scores = answers.score_answers(found, PROMPTS * 20, judge=judge, rewards={"dpo-0": judge})
    measured = {name: columns(found[name], **scores[name]) for name in found}
    records = {name: comparing._records(found[name]["answers"], measured[name]) for name in found}
    assert records["dpo-0"][3]["judge"] == records["dpo-0"][3]["reward_model"] == len(records["dpo-0"][3]["text"])
    assert records["sft-0"][0]["reward_model"] is None
    assert records["dpo-0"][5]["kl"] == pytest.approx(apart[5])


def test_the_quickstarts_judge_is_its_exact_reward():
    from dpo_recipes import playground

    namespace = runpy.run_path(str(RECIPES / "quickstart.py"))
    pair = next(iter(playground.load_pairs("playground", train_pairs=1)["train"]))
    assert namespace["judge"](pair["prompt"], pair["chosen"][0]["content"]) == 1.0
    assert namespace["judge"](pair["prompt"], pair["rejected"][0]["content"]) < 1.0


def test_the_report_does_not_make_a_run_another(folder, monkeypatch):
    """Only what trains is part of the request."""
    stage = planned()[1]
    request = stage.launch.request()
    package = Path(processes.__file__).parents[1]
    read = {path for path in package.rglob("*.py") if {"compare", "pages"} & {*path.relative_to(package).parts}}
    assert read
    hashed = []
    original = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda stream, kind: hashed.append(Path(stream.name)) or original(stream, kind)
    )
    assert stage.launch.request() == request
    assert hashed
    assert not read & {*hashed}


TINY = {
    **{"max_length": 256, "pairs_per_update": 4, "per_device_train_batch_size": 4, "warmup_steps": 0},
    **{"max_completion_length": 8, "generation_batch_size": 8, "num_iterations": 2},
    **{"rounds.num_rounds": 2, "rounds.num_generations": 2},
    **{"dpo.max_steps": 4, "reward.max_steps": 3, "save_steps": 1, "eval_strategy": "no", "learning_rate": 1e-3},
}


def started(dpo_recipes, folder, *, wait_for=None):
    """A comparison of the tiny model, killed with all that it started once `wait_for` exists."""
    words = [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
    call = [dpo_recipes, "compare", "hh-rlhf-lora", "--profile", "cpu", "--seeds", "0", "--prompts", "12", *words]
    call += ["--dataset_name", "rows.jsonl", "--model_name_or_path", "start", "--output_dir", "out"]
    if wait_for is None:
        return run_command(*call, cwd=folder, timeout=1800)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "killed.log").open("a") as log:
        process = psutil.Popen([str(word) for word in call], cwd=folder, env=environment, stdout=log, stderr=log)
    end = time.monotonic() + 900
    while not (folder / "out" / wait_for).exists():
        assert process.poll() is None, (folder / "killed.log").read_text()
        assert time.monotonic() < end
        time.sleep(0.02)
    for each in [*process.children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs([process], timeout=60)
    return None


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on_to_the_same_result(tmp_path, tiny_model, hh_rows, dpo_recipes):
    """One in one go, one killed in DPO, in rounds, in PPO and among the answers; a third stage fails and is told."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        shutil.copytree(tiny_model, tmp_path / name / "start")
        shutil.copy(hh_rows, tmp_path / name / "rows.jsonl")
    result = started(dpo_recipes, tmp_path / "whole")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Stage 5 of 5: ppo-0.1-0; " in result.stdout
    assert " min left" in result.stdout
    out = tmp_path / "whole" / "out"
    whole = json.loads((out / "results.json").read_text())
    assert [model["algorithm"] for model in whole["models"]] == ["sft", "dpo", "rounds", "ppo"]
    assert all(check["held"] for check in whole["fairness"]), whole["fairness"]
    assert len(whole["fairness"]) == 7  # a judge was trained
    assert {whole["costs"][f"{kind}-0.1-0"]["samples"] for kind in ("dpo", "rounds", "ppo")} == {16}
    assert all(run["reward_model"] is not None for run in whole["runs"].values())
    assert len(whole["runs"]["ppo-0.1-0"]["judge"]) == whole["prompts"] <= 12
    parts = {name: part["prompts"] for name, part in whole["parts"].items()}
    assert parts["learn"] > parts["judge"] > parts["test"] > 0
    assert len((out / "records.jsonl").read_text().splitlines()) == 4 * whole["prompts"]

    places = ("dpo-0.1-0/checkpoint-2/trainer_state.json", "rounds-0.1-0/round-2", "ppo-0.1-0/checkpoint-4")
    for place in (*places, "answers/dpo-0.1-0.json"):
        started(dpo_recipes, tmp_path / "killed", wait_for=place)
    result = started(dpo_recipes, tmp_path / "killed")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("finished before") == 5
    killed = json.loads((tmp_path / "killed" / "out" / "results.json").read_text())
    assert killed["runs"] == whole["runs"]
    assert "Resuming from" in (tmp_path / "killed" / "killed.log").read_text()

    (tmp_path / "killed" / "out" / "reward-0" / "done.json").unlink()
    (tmp_path / "killed" / "out" / "reward-0" / "settings.json").write_text("{}")  # none of ours: not replaced
    result = started(dpo_recipes, tmp_path / "killed")
    assert result.returncode == 1, result.stdout + result.stderr
    told = json.loads((tmp_path / "killed" / "out" / "results.json").read_text())
    assert told["failed"] == ["reward-0 (exit 2)", "rounds-0.1-0 (not begun)", "ppo-0.1-0 (not begun)"]
    assert [model["label"] for model in told["models"]] == ["SFT", "DPO, beta 0.1"]
    assert told["verdict"][0].startswith("With reservations: ")
    assert told["verdict"][1].startswith("This is a part of the comparison")
    assert result.stdout.splitlines()[-1] == told["verdict"][0]
