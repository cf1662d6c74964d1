"""Every recipe is trained by the command that a user types, and what it leaves is looked at."""

import ast
import difflib
import itertools
import json
import math
import re
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from commands import RECIPES, REPOSITORY, run_command, run_forked, run_train
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from small_disk import small_disk
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, ModelConfig, TrlParser, get_quantization_config

from dpo_recipes import playground
from dpo_recipes.doctor.miniature import miniature_flags
from dpo_recipes.loading import load_rows
from dpo_recipes.models import rewards
from dpo_recipes.models.generation import generate
from dpo_recipes.recipe import RecipeArguments, argument_classes, parse_recipe

NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))
PROFILES = sorted(path.stem for path in (RECIPES / "profiles").glob("*.yaml"))
HH_RLHF = ["hh_rlhf_full", "hh_rlhf_lora", "hh_rlhf_qlora", "hh_rlhf_sft"]
REWARD = ["gsm8k_verifier", "hh_rlhf_reward", "imdb_sentiment_reward", "quickstart_reward"]
ONLINE = ["hh_rlhf_ppo", "hh_rlhf_rloo", "imdb_sentiment_ppo", "quickstart_ppo", "quickstart_rloo"]
ROUNDS = ["hh_rlhf_rounds", "quickstart_rounds"]
SIBLINGS = {"gsm8k": "gsm8k_lora", "hh": "hh_rlhf_lora", "imdb": "imdb_sentiment_lora", "quickstart": "quickstart"}
"""DPO recipes by the first word of a name."""
ON_DATASETS = [
    *HH_RLHF,
    "gsm8k_lora",
    "mixture_lora",
    "oasst1_lora",
    "preference_lora",
    "shp_lora",
    "ultrafeedback_qlora",
]


def test_there_are_recipes_and_profiles():
    assert {"quickstart", "quickstart_sft", *ON_DATASETS, *REWARD, *ONLINE, *ROUNDS} <= set(NAMES)
    assert {"cpu", "local", "gpu", "turing"} <= set(PROFILES)


def classes_of(name):
    """RecipeArguments or its subclass, the TRL config, ModelConfig."""
    kinds = argument_classes(runpy.run_path(str(RECIPES / f"{name}.py")))
    order = (RecipeArguments, TrainingArguments, ModelConfig)
    return tuple(next(kind for kind in [*kinds, ModelConfig] if issubclass(kind, wanted)) for wanted in order)


def config_of(name):
    return classes_of(name)[1]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_parses_under_every_profile(name, profile, monkeypatch):
    recipe = runpy.run_path(str(RECIPES / f"{name}.py"))
    assert {"RECIPE", "load_pairs", "main"} <= set(recipe)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    parser = TrlParser(classes_of(name))
    parser.set_defaults_with_config(activation_checkpointing=True)  # as parse_recipe does
    assert parser.set_defaults_with_config(**recipe["RECIPE"]) == []
    flags = ["--config", str(RECIPES / "profiles" / f"{profile}.yaml"), "--use_cpu", "true"]
    script_args, training_args, model_args = parser.parse_args_and_config(flags)
    # A profile changes only what the machine dictates.
    for key in ("beta", "learning_rate", "num_train_epochs", "max_steps"):
        if key in recipe["RECIPE"]:
            assert getattr(training_args, key) == recipe["RECIPE"][key]
    assert script_args.pairs_per_update == recipe["RECIPE"]["pairs_per_update"]
    assert script_args.pairs_per_update % training_args.per_device_train_batch_size == 0
    if model_args.load_in_4bit:  # the compute dtype of the 4-bit products, too
        assert model_args.dtype == ("float16" if profile == "turing" else "bfloat16")
        assert get_quantization_config(model_args).bnb_4bit_compute_dtype == getattr(torch, model_args.dtype)
    if profile == "turing":
        assert (training_args.fp16, training_args.bf16, model_args.dtype) == (True, False, "float16")
    if profile == "cpu":
        assert not training_args.bf16
        assert model_args.dtype == ("bfloat16" if model_args.load_in_4bit else "float32")


@pytest.mark.parametrize("name", NAMES)
def test_recipes_share_their_optimiser_and_bookkeeping(name, tmp_path):
    recipe = runpy.run_path(str(RECIPES / f"{name}.py"))["RECIPE"]
    parser = TrlParser(classes_of(name))
    parser.set_defaults_with_config(**recipe)
    flags = ["--use_cpu", "true", "--bf16", "false", "--activation_checkpointing", "false"]
    _, args, _ = parser.parse_args_and_config([*flags, "--output_dir", str(tmp_path)])
    optimizer = Trainer(model=torch.nn.Linear(2, 2), args=args, eval_dataset=[0]).create_optimizer()
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95)
        assert group["weight_decay"] == 0.0
        assert group["lr"] == recipe["learning_rate"]
    assert args.lr_scheduler_type == "cosine"
    assert args.save_total_limit == 3
    assert args.eval_steps == args.save_steps
    assert args.eval_strategy == "steps"
    assert args.report_to == []


def test_recipes_differ_only_where_they_must():
    """The code of two recipes differs in names and settings, line for line."""
    reference = (RECIPES / "hh_rlhf_lora.py").read_text().splitlines()
    words = ("DPO", "SFT", "Reward", "answers", 'pairs["', "merge=True", "shared_prefix=")
    for name in [*HH_RLHF, "hh_rlhf_reward"]:
        other = (RECIPES / f"{name}.py").read_text().splitlines()
        start = [
            lines.index("def load_pairs(script_args: RecipeArguments) -> DatasetDict:") for lines in (reference, other)
        ]
        changed = [
            line
            for line in difflib.ndiff(reference[start[0] :], other[start[1] :])
            if line[0] in "+-" and not any(word in line for word in words)
        ]
        assert changed in ([], ["-     finish_run(trainer, script_args)"]), name


@pytest.mark.parametrize("data", ["hh_rlhf", "quickstart"])
def test_the_code_of_ppo_and_rloo_is_the_same(data):
    codes = [(RECIPES / f"{data}_{name}.py").read_text().partition("\ndef load_pairs")[2] for name in ("ppo", "rloo")]
    assert codes[0] == codes[1].replace("RLOO", "PPO")
    assert len(codes[0]) > 500
    for name in ("hh_rlhf_rloo", "quickstart_rloo"):
        assert "not PPO" in (RECIPES / f"{name}.py").read_text()


def test_the_loop_of_all_recipes_in_rounds_is_the_same():
    texts = [(RECIPES / f"{name}.py").read_text() for name in ROUNDS]
    loops = [text[text.index("\ndef main") : text.index("    finish_run(")] for text in texts]
    assert loops[0] == loops[1]
    assert not any("offline" in text for text in texts)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ONLINE)
def test_a_rollout_is_whole_updates_under_every_profile(name, processes, profile, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(TrainingArguments, "world_size", processes)
    flags = ["--config", str(RECIPES / "profiles" / f"{profile}.yaml"), "--use_cpu", "true"]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    recipe = runpy.run_path(str(RECIPES / f"{name}.py"))["RECIPE"]
    script_args, args, _ = parse_recipe(recipe, classes_of(name))
    at_a_time = args.per_device_train_batch_size * processes
    assert args.generation_batch_size == recipe["generation_batch_size"] == args.steps_per_generation * at_a_time
    assert script_args.pairs_per_update == args.gradient_accumulation_steps * at_a_time
    assert args.steps_per_generation % args.gradient_accumulation_steps == 0
    updates = args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps
    assert args.save_steps % updates == 0, "TRL keeps no rollout in a checkpoint"


@pytest.mark.parametrize(
    ("name", "sibling"),
    [(name, SIBLINGS[name.split("_")[0]]) for name in ["hh_rlhf_sft", *REWARD, *ONLINE, *ROUNDS]],
)
def test_settings_that_two_algorithms_share_read_the_same(name, sibling):
    """Same groups in the same order, and the same line for the same setting but for what must differ."""
    lines = {}
    for each in (sibling, name):
        text = (RECIPES / f"{each}.py").read_text()
        settings = text[text.index("RECIPE = dict(") : text.index("\ndef load_pairs")].splitlines()[1:]
        lines[each] = {line.partition("=")[0].strip() if "=" in line else line.strip(): line for line in settings}
    groups = [[key for key in lines[each] if key.startswith("# ")] for each in lines]
    assert groups[0] == groups[1] == ["# Data", "# Model", "# Optimisation", "# Bookkeeping"]
    may_change = {"model_name_or_path", "learning_rate", "num_train_epochs", "output_dir"}
    if name in ONLINE:  # which counts answers
        may_change |= {"beta", "pairs_per_update", "per_device_train_batch_size"}
        may_change |= {"logging_steps", "eval_steps", "save_steps"}
    if name in ROUNDS:
        may_change |= {"eval_steps", "save_steps"}
    shared = set(lines[sibling]) & set(lines[name]) - may_change
    assert len(shared) > (10 if name in ONLINE else 15)
    assert {key: lines[name][key] for key in shared} == {key: lines[sibling][key] for key in shared}


@pytest.mark.parametrize("name", [name for name in ON_DATASETS if config_of(name) is DPOConfig])
def test_dpo_recipes_differ_in_their_data_model_and_names_alone(name):
    reference, other = ((RECIPES / f"{each}.py").read_text() for each in ("hh_rlhf_lora", name))
    marks = ["\nfrom datasets", "\nRECIPE", "\ndef load_pairs", "\ndef main"]
    cuts = [[*map(text.index, marks), len(text)] for text in (reference, other)]
    parts = [
        [text[a:b] for a, b in itertools.pairwise(cut)] for text, cut in zip((reference, other), cuts, strict=True)
    ]
    imports, settings, _, main = zip(*parts, strict=True)
    assert main[0] == main[1]
    changed = [line[2:].strip() for line in difflib.ndiff(*(text.splitlines() for text in settings)) if line[0] in "+-"]
    may_change = ("dataset_name=", "model_name_or_path=", "**", "learning_rate=", "per_device_", "output_dir=")
    assert [line for line in changed if not line.startswith(may_change)] == []
    changed = [line[2:] for line in difflib.ndiff(*(text.splitlines() for text in imports)) if line[0] in "+-"]
    rooms = tuple(f"from dpo_recipes.{room} import" for room in ("dataset_adapters", "loading", "presets"))
    assert [line for line in changed if not line.startswith(rooms)] == []


def test_no_recipe_imports_another_and_nothing_imports_a_recipe():
    files = [*RECIPES.glob("*.py"), *(REPOSITORY / "dpo_recipes").rglob("*.py")]
    assert len(files) > len(NAMES)
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [module or ""]
            for imported in names:
                assert imported.split(".")[0] not in {"recipes", *NAMES}, file
                if RECIPES not in file.parents and imported.startswith("dpo_recipes."):
                    room = file.relative_to(REPOSITORY / "dpo_recipes").parts[0].removesuffix(".py")
                    other = imported.split(".")[1]
                    assert room == other or RANK[room] > RANK[other], f"{file} imports {imported}"


ROOMS = [  # imports point from a later line to an earlier one
    {"errors", "trl_patches", "__init__"},
    {"estimates", "files", "machine", "presets", "secrecy", "terminal"},
    {"dataset_adapters", "flags", "manifest", "pages", "playground", "settings"},
    {"catalog", "data_files", "ending", "models", "tracking"},
    {"loading", "ppo", "recipe", "shared_prefix"},
    {"preflight"},
    {"health"},
    {"runs"},
    {"launch", "sample"},
    {"evaluate", "publish", "rounds", "vote"},
    {"compare", "doctor"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}


def rows_for(name, rows_of):
    """What a recipe is given in these tests as --dataset_name."""
    if name == "mixture_lora":
        return f"{rows_of['hh']}:60+{rows_of['shp']}+{rows_of['ultrafeedback']}:40"
    return str(rows_of["marked" if name == "gsm8k_lora" else name.split("_")[0]])


STAND_INS = {
    # What a profile for cards asks for that a CPU can do: the dtypes, the batches, checkpointing; no pinned memory.
    profile: {"use_cpu": True, "dataloader_pin_memory": False}
    for profile in PROFILES
    if profile != "cpu"
}
STAND_INS["turing"] |= {"fp16": False, "bf16": False}  # a CPU has no loss scale; the weights are float16 all the same


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory):
    return tmp_path_factory.mktemp("miniatures")


IN_SHORT = {("hh_rlhf_lora", "gpu"), ("hh_rlhf_reward", "gpu"), ("quickstart_ppo", "gpu")}
"""Recipes and profiles that `make test` trains."""
ALIKE = ("gpu", "local")  # they differ in their batches alone: recipes train under the one and the other in turn
TRAINED = [
    both
    for number, name in enumerate(NAMES)
    for both in itertools.product([name], STAND_INS)
    if both in IN_SHORT or both[1] not in ALIKE or both[1] == ALIKE[number % 2]
]


def test_profiles_of_which_one_is_trained_differ_in_their_batches_alone():
    one, other = (yaml.safe_load((RECIPES / "profiles" / f"{name}.yaml").read_text()) for name in ALIKE)
    batches = {"tokens_per_step", "per_device_train_batch_size", "per_device_eval_batch_size"}
    assert one.keys() == other.keys()
    assert {name for name in one if one[name] != other[name]} == batches
    assert {profile for _, profile in TRAINED} == {*STAND_INS}


@pytest.mark.parametrize(
    ("name", "profile"),
    [pytest.param(*both, marks=[] if both in IN_SHORT else pytest.mark.slow, id="-".join(both)) for both in TRAINED],
)
def test_every_recipe_trains_under_what_a_profile_for_cards_asks_for(name, profile, tmp_path, miniatures, monkeypatch):
    """By the command that a user types, from data to page; the playground asks four prompts instead of two hundred."""
    few = playground.evaluation_prompts()[:4]
    monkeypatch.setattr(playground, "evaluation_prompts", lambda: few)
    file = tmp_path / f"{profile}.yaml"
    settings = yaml.safe_load((RECIPES / "profiles" / f"{profile}.yaml").read_text())
    file.write_text(yaml.safe_dump(settings | STAND_INS[profile]))
    flags = miniature_flags(RECIPES / f"{name}.py", miniatures)
    result = run_train(name.replace("_", "-"), "--profile", file, *flags, "--output_dir", "run", cwd=tmp_path)
    assert result.returncode == 0, f"{name} does not go with the profile {profile}: {result.stdout}{result.stderr}"
    run = tmp_path / "run"
    assert {"done.json", "metrics.json", "report.html"} <= {file.name for file in run.iterdir()}
    done, held = (json.loads((run / f"{file}.json").read_text()) for file in ("done", "settings"))
    assert done["warnings"] == []
    budget = settings["tokens_per_step"] if issubclass(config_of(name), DPOConfig) else None  # others count rows
    assert held["tokens_per_step"] == budget
    assert held["per_device_train_batch_size"] == settings["per_device_train_batch_size"]
    assert held["bf16"] == (profile != "turing")
    part = run / "round-1" if name in ROUNDS else run
    losses = json.loads((part / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert all(math.isfinite(log["loss"]) for log in losses if "loss" in log)


def test_a_recipe_that_makes_its_own_model_refuses_a_dtype_of_its_own(tmp_path):
    result = run_train("quickstart-sft", "--profile", "cpu", "--dtype", "bfloat16", cwd=tmp_path)
    assert result.returncode == 2
    assert "dtype has no effect here: this recipe makes its own model" in result.stderr


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "hh_rlhf_lora" else pytest.mark.slow) for name in ON_DATASETS]
)
def test_recipe_trains_and_what_it_saved_is_what_it_trained(name, tmp_path, tiny_model, rows_of):
    dataset = rows_for(name, rows_of)
    result = run_train(
        *(name.replace("_", "-"), "--profile", "cpu"),
        *("--dataset_name", dataset, "--model_name_or_path", tiny_model, "--output_dir", "run", "--max_steps", "5"),
        *("--pairs_per_update", "4", "--eval_pairs", "4", "--logging_steps", "1", "--warmup_steps", "0"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Data account" in result.stdout
    run = tmp_path / "run"
    files = {path.name for path in run.iterdir()}
    assert {"preflight.json", "metrics.json", "settings.json", "environment.txt", "curves.png", "README.md"} <= files
    done = json.loads((run / "done.json").read_text())
    assert done["updates"] == 5
    assert all(done[key] for key in ("settings_hash", "data_hash", "start_hash", "request", "versions", "hardware"))

    history = json.loads((run / "checkpoint-5" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 5
    assert all(map(math.isfinite, losses))
    if name != "hh_rlhf_sft":
        assert losses[0] == pytest.approx(math.log(2), abs=2e-2 if name.endswith("qlora") else 1e-4)

    start = load_file(tiny_model / "model.safetensors")
    linear = {key for key in start if "_proj." in key}
    if name.endswith("lora"):
        weights = load_file(run / "adapter_model.safetensors")
        assert len(weights) == 2 * len(linear)
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        assert all(weight.abs().sum() > 0 for weight in weights.values())  # B starts at 0
        assert "model.safetensors" not in files
    else:
        weights = load_file(run / "model.safetensors")
        moved = {key for key in start if not torch.equal(start[key], weights[key])}
        assert moved == (set(start) if name == "hh_rlhf_full" else linear)
        assert "adapter_config.json" not in files
    if name == "hh_rlhf_sft":
        starts_dpo(run, tmp_path, dataset)
    else:
        kl = json.loads((run / "metrics.json").read_text())["kl"]
        assert kl["n"] == len((run / "samples.jsonl").read_text().splitlines())
        assert kl["tokens"] > kl["n"]
        shown = re.compile(rf"KL to the reference model, nats +- +{kl['nats']:.2f} ± {kl['standard_error']:.2f}\n")
        assert shown.search(result.stdout)
        assert shown.search((run / "README.md").read_text())
        reloads_to_the_same_logps(name, run, dataset)


def reloads_to_the_same_logps(name, run, dataset):
    """What lies in the folder, loaded by plain transformers and peft, gives the log-probs that the run measured."""
    settings = json.loads((run / "settings.json").read_text())
    kwargs = {}
    if name.endswith("qlora"):
        fields = {
            key: settings[key] for key in ("load_in_4bit", "use_bnb_nested_quant", "dtype", "bnb_4bit_quant_type")
        }
        kwargs = {"quantization_config": get_quantization_config(ModelConfig(**fields)), "device_map": {"": "cpu"}}
    loader = AutoModelForCausalLM if name == "hh_rlhf_full" else AutoPeftModelForCausalLM
    model = loader.from_pretrained(run, dtype=getattr(torch, settings["dtype"]), **kwargs).eval()
    tokenizer = AutoTokenizer.from_pretrained(run)
    measured = json.loads((run / "metrics.json").read_text())["chosen_logps"]
    held_out = {str(json.loads(line)["prompt"]) for line in (run / "samples.jsonl").read_text().splitlines()}
    pairs = runpy.run_path(str(RECIPES / f"{name}.py"))["load_pairs"](RecipeArguments(dataset_name=dataset))
    logps = []
    for pair in pairs["test"]:
        if str(pair["prompt"]) in held_out:
            prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
            both = tokenizer.apply_chat_template(pair["prompt"] + pair["chosen"], return_dict=False)
            with torch.no_grad():
                logits = model(torch.tensor([both])).logits[0, :-1].float()
            token_logps = logits.log_softmax(-1).gather(1, torch.tensor(both[1:])[:, None])[:, 0]
            logps.append(token_logps[len(prompt) - 1 :].sum().item())
    assert len(logps) == 4
    tolerance = 2e-2 if name.endswith("qlora") else 1e-5  # bfloat16 products, batched otherwise
    assert sum(logps) / 4 == pytest.approx(measured["after"], rel=tolerance)
    assert measured["after"] != measured["before"]


KINDS = {
    "LoRA": [],
    "4-bit": ["--load_in_4bit", "true", "--use_bnb_nested_quant", "true", "--dtype", "bfloat16"],
    "full": ["--use_peft", "false"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model_reloads_whole_and_scores_as_it_did(kind, tmp_path, tiny_model, rows_of):
    result = run_train(
        *("hh-rlhf-reward", "--profile", "cpu", "--dataset_name", rows_of["hh"]),
        *("--model_name_or_path", tiny_model, "--output_dir", "run", "--max_steps", "5", "--pairs_per_update", "4"),
        *("--eval_pairs", "4", "--logging_steps", "1", "--warmup_steps", "0", "--learning_rate", "1e-2", *KINDS[kind]),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "run"
    files = {path.name for path in run.iterdir()}
    assert {"model.safetensors", "tokenizer_config.json", "chat_template.jinja", "curves.png", "done.json"} <= files
    assert "adapter_config.json" not in files
    checkpoint = load_file(next((run / "checkpoint-5").glob("*model.safetensors")))
    start, weights = (load_file(folder / "model.safetensors") for folder in (tiny_model, run))
    assert set(weights) == {*start, "score.weight"} - {"lm_head.weight"}
    moved = {key for key in set(start) & set(weights) if not torch.equal(start[key], weights[key])}
    assert moved == set(start) & set(weights) if kind == "full" else {key for key in start if "_proj." in key}
    trained = checkpoint["score.weight" if kind == "full" else "base_model.model.score.weight"]
    assert torch.equal(weights["score.weight"], trained.to(weights["score.weight"].dtype))
    assert {weight.dtype for weight in checkpoint.values()} == {torch.float32}

    model = AutoModelForSequenceClassification.from_pretrained(run).eval()
    assert model.config.num_labels == 1
    metrics = json.loads((run / "metrics.json").read_text())
    measured, tokenizer = metrics["reward_scores"], AutoTokenizer.from_pretrained(run)
    pairs = runpy.run_path(str(RECIPES / "hh_rlhf_reward.py"))["load_pairs"](
        RecipeArguments(dataset_name=str(rows_of["hh"]))
    )["test"]
    assert len(pairs) == metrics["reward_accuracy"]["all"]["n"] == 4
    for side in ("chosen", "rejected"):
        scores = []
        for pair in pairs:
            ids = tokenizer.apply_chat_template(pair["prompt"] + pair[side], return_dict=False)
            with torch.no_grad():
                scores.append(model(torch.tensor([ids])).logits.item())
        tolerance = (
            0.2 if kind == "4-bit" else 1e-4
        )  # what was measured in 4 bits is merged into the base's own weights
        assert sum(scores) / 4 == pytest.approx(measured[f"score of {side}"]["mean"], abs=tolerance)
    assert measured["margin"]["mean"] > 0.2
    assert "reward-model accuracy   " in result.stdout
    assert "WARNING: The reward model" not in result.stdout


@pytest.mark.slow
def test_a_verifier_that_learned_nothing_is_no_better_than_chance_in_words(tmp_path, tiny_model):
    """A random score head, not trained, on questions whose right solutions look like the wrong ones."""
    rows = [
        {"question": f"{n} + {n % 7} = ?", "ground_truth": f"A: {n + n % 7}"}
        | {f"model_{k}": {"is_correct": k == n % 4, "solution": f"A: {n + n % 7 + (k - n % 4)}"} for k in range(4)}
        for n in range(400)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_train(
        *("gsm8k-verifier", "--profile", "cpu", "--dataset_name", "rows.jsonl", "--model_name_or_path", tiny_model),
        *("--output_dir", "run", "--max_steps", "1", "--pairs_per_update", "4", "--learning_rate", "0"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    found = metrics["best_of"]
    asked, ways = found["questions"], found["by_size"]["4"]
    assert 50 < asked == ways["best_of"]["n"] < 120, "a fifth of the questions"
    assert (ways["chance"]["mean"], ways["oracle"]["mean"]) == (0.25, 1.0)
    assert ways["majority"]["mean"] == pytest.approx(0.25), "all four say something else"
    gain = ways["over_chance"]
    assert gain["low"] <= 0, "nothing was learned"
    assert metrics["verdict"]["word"] in ("not known", "worse")
    assert "a random one has 0.250" in metrics["verdict"]["sentence"]
    [warning] = [text for text in metrics["warnings"] if "The best of 4 answers by this reward model is" in text]
    assert f"as far as {asked} questions show" in warning
    printed = f"right answers, best of 4 by the reward model +{ways['best_of']['mean']:.3f} \\["
    for shown in (result.stdout, (run / "README.md").read_text()):
        assert re.search(printed, shown)
    page = (run / "report.html").read_text()
    assert "<h2>Best of N</h2>" in page
    for label in (
        "right answers, majority vote of 2",
        "right answers, any of 4 (oracle)",
        "best of 4 less a random one",
    ):
        assert label in page
        assert label in result.stdout


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        pytest.param("hh_rlhf_rloo", [], id="RLOO"),
        pytest.param("hh_rlhf_rloo", ["--accelerate", "cpu2"], id="RLOO, two processes", marks=pytest.mark.slow),
        pytest.param("hh_rlhf_ppo", [], id="PPO", marks=pytest.mark.slow),
        pytest.param(
            *("hh_rlhf_ppo", ["--use_peft", "false", "--sync_ref_model", "true", "--ref_model_sync_steps", "1"]),
            id="PPO, all weights, moving reference",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_online_recipe_trains_and_leaves_a_policy_alone(
    name, flags, tmp_path, tiny_model, reward_model, hh_rows, dpo_recipes
):
    run_it = partial(run_command, dpo_recipes, "train") if "--accelerate" in flags else run_train
    result = run_it(
        *(name, "--profile", "cpu", "--dataset_name", hh_rows, "--output_dir", "run"),
        *("--model_name_or_path", tiny_model, "--reward_model_name_or_path", reward_model, "--max_steps", "4"),
        *("--pairs_per_update", "8", "--generation_batch_size", "16", "--per_device_train_batch_size", "4"),
        *("--num_iterations", "1", "--eval_pairs", "4", "--logging_steps", "1", "--warmup_steps", "0"),
        *("--max_prompt_length", "200", "--max_completion_length", "8", "--learning_rate", "1e-3", *flags),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "run"
    assert "Data account (max_prompt_length 200 tokens)" in result.stdout
    assert "An update: 8 answers = 4 a device" in result.stdout
    done, metrics = (json.loads((run / f"{file}.json").read_text()) for file in ("done", "metrics"))
    assert done["updates"] == 4
    assert len(done["reward_model_hashes"][0]) == len(done["start_hash"]) == 16
    history = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "loss" in entry]) == 4
    assert all(math.isfinite(entry["reward"]) for entry in history if "reward" in entry)

    # What lies there loads in plain transformers or peft, without a critic.
    whole = "--use_peft" in flags
    weights = load_file(run / ("model.safetensors" if whole else "adapter_model.safetensors"))
    start = load_file(tiny_model / "model.safetensors")
    assert len(weights) == (len(start) if whole else 2 * len([key for key in start if "_proj." in key]))
    assert not [key for key in weights if "critic" in key or "score" in key]
    loader = AutoModelForCausalLM if whole else AutoPeftModelForCausalLM
    model = loader.from_pretrained(run, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run)

    answers = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(answers) == metrics["kl"]["n"] == 4
    prompts, texts = [each["prompt"] for each in answers], [each["after"]["text"] for each in answers]
    again = generate(model, tokenizer, prompts, max_new_tokens=8)
    assert [each["text"] for each in again] == texts
    scores = [each["after"]["scores"]["reward-model score"] for each in answers]
    assert rewards.score(*rewards.load_reward_model(str(reward_model)), prompts, texts) == pytest.approx(
        scores, abs=1e-4
    )
    before = generate(AutoModelForCausalLM.from_pretrained(tiny_model), tokenizer, prompts, max_new_tokens=8)
    assert [each["text"] for each in before] == [each["before"]["text"] for each in answers]
    assert metrics["kl"]["nats"] != 0
    assert "reward-model score, greedy" in (run / "README.md").read_text()


def test_a_reward_model_that_is_none_is_refused_before_anything_is_loaded(tmp_path, tiny_model, hh_rows):
    result = run_train(
        *("hh-rlhf-rloo", "--profile", "cpu", "--dataset_name", hh_rows),
        *("--model_name_or_path", tiny_model, "--reward_model_name_or_path", tiny_model, "--max_steps", "1"),
        *("--pairs_per_update", "8", "--generation_batch_size", "8", "--max_completion_length", "8"),
        *("--max_prompt_length", "200"),
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert "is a LlamaForCausalLM, which has no score head" in result.stderr
    assert "Loading weights" not in result.stderr


@pytest.mark.slow
def test_a_reward_model_that_learned_nothing_is_no_success(tmp_path, tiny_model, rows_of):
    result = run_train(
        *("hh-rlhf-reward", "--profile", "cpu", "--dataset_name", rows_of["hh"]),
        *("--model_name_or_path", tiny_model, "--output_dir", "run", "--max_steps", "1", "--pairs_per_update", "4"),
        *("--eval_pairs", "4", "--learning_rate", "0"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search("WARNING: The reward model ranks the held-out pairs .* than a coin would", result.stdout)
    assert "**Warning.** The reward model ranks" in (tmp_path / "run" / "README.md").read_text()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["warnings"]


def starts_dpo(run, folder, hh_rows):
    """A DPO recipe takes what SFT left."""
    result = run_train(
        *("hh-rlhf-lora", "--profile", "cpu", "--dataset_name", hh_rows, "--model_name_or_path", run),
        *("--max_steps", "1", "--pairs_per_update", "4", "--eval_pairs", "2", "--logging_steps", "1"),
        cwd=folder,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    done = json.loads((folder / "outputs" / "hh_rlhf_lora" / "done.json").read_text())
    assert done["start_hash"] != json.loads((run / "done.json").read_text())["start_hash"]


@pytest.mark.slow
def test_a_copied_recipe_runs_from_another_folder_by_plain_python(tmp_path, tiny_model, hh_rows, dpo_recipes):
    copied = run_command(dpo_recipes, "copy", "hh-rlhf-lora", cwd=tmp_path)
    assert copied.returncode == 0, copied.stderr
    recipe = tmp_path / "hh_rlhf_lora.py"
    recipe.write_text(recipe.read_text().replace("beta=0.1", "beta=0.5"))
    result = run_command(
        *(sys.executable, recipe, "--use_cpu", "true", "--bf16", "false", "--dataset_name", hh_rows),
        *("--model_name_or_path", tiny_model, "--max_steps", "1", "--pairs_per_update", "4", "--held_out", "0.4"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "outputs" / "hh_rlhf_lora"
    assert json.loads((run / "settings.json").read_text())["beta"] == 0.5
    assert result.stdout.splitlines()[-1] == json.loads((run / "metrics.json").read_text())["verdict"]["sentence"]
    assert not re.search("[\r\x1b]|Failed|Warning|warn", result.stdout + result.stderr), (
        "nothing that looks wrong is not"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--betta", "0.3"], "betta"),
        (["--dataset_name", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model_name_or_path", "outputs/nothing"], "There is no model in outputs/nothing"),
    ],
)
def test_a_wrong_call_ends_with_status_2_and_no_traceback(flags, message, tmp_path, tiny_model, hh_rows):
    result = run_train(
        *("hh-rlhf-lora", "--profile", "cpu", "--dataset_name", hh_rows),
        *("--model_name_or_path", tiny_model, *flags),
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_hint_after_a_mistyped_flag_is_a_command_that_lists_the_settings(tmp_path):
    refused = run_train("hh-rlhf-lora", "--profile", "cpu", "--nonsense", "1", cwd=tmp_path)
    assert refused.returncode == 2
    [hint] = re.findall(r"`(.*)` lists the settings", refused.stderr)
    listed = run_command(*shlex.split(hint), cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert "--pairs_per_update" in listed.stdout
    refused = run_forked("inspect", "rows.jsonl", "--model_name_or_path", "m", "--nonsense", "1", cwd=tmp_path)
    assert "--nonsense" in refused.stderr
    assert "--help" not in refused.stderr, "there is no file whose settings could be listed"


@pytest.mark.slow
def test_columns_are_renamed_from_the_command_line(tmp_path, tiny_model, rows_of):
    text = Path(rows_of["hh"]).read_text().replace('"chosen"', '"good"').replace('"rejected"', '"bad"')
    (tmp_path / "rows.jsonl").write_text(text)
    command = ["hh-rlhf-lora", "--profile", "cpu", "--dataset_name", "rows.jsonl"]
    command += ["--model_name_or_path", tiny_model, "--max_steps", "1", "--pairs_per_update", "4", "--eval_pairs", "2"]
    result = run_train(*command, "--columns", "chosen=better,rejected=bad", cwd=tmp_path)
    assert result.returncode == 2
    assert "the dataset has ['good', 'bad']" in result.stderr
    result = run_train(*command, "--columns", "chosen=good,rejected=bad", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_rows_of_another_schema_end_with_status_2(tmp_path, tiny_model):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "good": "b", "bad": "c"}\n' * 3)
    command = ["hh-rlhf-lora", "--profile", "cpu", "--dataset_name", "rows.jsonl", "--model_name_or_path", tiny_model]
    for columns, message in (
        ([], "hh_rlhf needs the columns"),
        (["--columns", "chosen=good,rejected=bad"], "No usable"),
    ):
        result = run_train(*command, *columns, cwd=tmp_path)
        assert result.returncode == 2
        assert message in result.stderr
        assert "recipe preference-lora" in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("adapter", ["hh", "oasst1", "preference", "shp", "ultrafeedback"])
def test_preference_lora_reads_every_layout_by_its_columns(adapter, rows_of, tmp_path):
    load_pairs = runpy.run_path(str(RECIPES / "preference_lora.py"))["load_pairs"]
    pairs = load_pairs(RecipeArguments(dataset_name=str(rows_of[adapter])))
    assert sum(map(len, pairs.values())) == 120
    assert {turn["role"] for turn in pairs["train"][0]["prompt"]} == {"user"}


def test_a_missing_file_of_pairs_shows_rows_that_train(tmp_path, tiny_model):
    command = ["preference-lora", "--profile", "cpu", "--model_name_or_path", tiny_model, "--dry_run", "true"]
    missing = run_train(*command, cwd=tmp_path)
    assert missing.returncode == 2
    assert "There is no file or folder pairs.jsonl" in missing.stderr
    assert "--dataset_name" in missing.stderr
    rows = [line for line in missing.stderr.splitlines() if line.startswith("{")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    there = run_train(*command, cwd=tmp_path)
    assert there.returncode == 0, there.stderr
    assert re.search(r"^pairs +2 +1$", there.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", ["hh_rlhf_lora", "hh_rlhf_ppo", "hh_rlhf_reward", "imdb_sentiment_sft"])
def test_more_tokens_than_the_model_has_positions_are_refused_with_numbers_that_work(
    name, tmp_path, tiny_model, reward_model
):
    """Alike by inspect, by the dry run and by the run itself, before anything is loaded."""
    flags = miniature_flags(RECIPES / f"{name}.py", tmp_path / "miniature")
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    model = Path(given["--model_name_or_path"])
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 120}))
    for limit in ("--max_prompt_length", "--max_completion_length"):
        given.pop(limit, None)
    flags = [word for pair in given.items() for word in pair]
    command = [name.replace("_", "-"), "--profile", "cpu", *flags]
    refused = [run_train(*command, cwd=tmp_path), run_train(*command, "--dry_run", "true", cwd=tmp_path)]
    if name in ("hh_rlhf_lora", "hh_rlhf_reward"):
        refused.append(run_forked("inspect", *command, cwd=tmp_path))
    assert [result.returncode for result in refused] == [2] * len(refused)
    assert len({result.stderr.splitlines()[-1] for result in refused}) == 1
    assert not any("Loading weights" in result.stderr for result in refused)
    advised = re.findall(r"--max_\w+ \d+", refused[0].stderr)
    assert advised
    result = run_train(*command, *" ".join(advised).split(), "--dry_run", "true", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_full_disk_ends_with_one_message(tmp_path, tiny_model, hh_rows):
    with small_disk(tmp_path / "disk", size="300k") as disk:
        result = run_train(
            *("hh-rlhf-full", "--profile", "cpu", "--dataset_name", hh_rows),
            *("--model_name_or_path", tiny_model, "--max_steps", "2", "--save_steps", "1", "--pairs_per_update", "4"),
            *("--eval_pairs", "2", "--output_dir", disk / "run"),
            cwd=tmp_path,
        )
    assert result.returncode == 1
    assert "A disk is full" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_fixture_is_read_whole(hh_rows):
    assert len(load_rows(RecipeArguments(dataset_name=str(hh_rows)))["train"]) == len(
        Path(hh_rows).read_text().splitlines()
    )
