import errno
import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from datasets import Features, Value
from datasets.arrow_writer import ArrowWriter
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, LlamaConfig, TrainingArguments
from trl import DPOConfig, ModelConfig, RewardConfig, RLOOConfig, ScriptArguments, SFTConfig

from dpo_recipes.doctor.miniature import CHAT_TEMPLATE
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import write_json
from dpo_recipes.manifest import claim, declare, settle
from dpo_recipes.ppo import PPOConfig
from dpo_recipes.presets import LORA, QLORA
from dpo_recipes.recipe import (
    OnlineArguments,
    RecipeArguments,
    argument_classes,
    load_tokenizer,
    parse_recipe,
    run,
)
from dpo_recipes.settings import settings_hash

TYPES = (RecipeArguments, DPOConfig, ModelConfig)


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Parses a small recipe with a profile and flags, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    recipe = dict(
        model_name_or_path="some/model",
        output_dir="outputs/x",
        beta=0.1,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
    )

    def parse(*flags, profile="", **settings):
        (tmp_path / "profile.yaml").write_text(profile or "seed: 42")
        monkeypatch.setattr(sys, "argv", ["recipe.py", "--config", "profile.yaml", *flags])
        return parse_recipe(recipe | settings, TYPES)

    return parse


def test_flags_beat_the_profile_and_the_profile_beats_the_recipe(parse):
    _, args, _ = parse("--beta", "0.3", profile="beta: 0.2\nlearning_rate: 2e-3", weight_decay=0.5)
    assert (args.beta, args.learning_rate, args.weight_decay) == (0.3, 2e-3, 0.5)


@pytest.mark.parametrize(
    ("flags", "profile", "settings"),
    [(["--betta", "1"], "", {}), ([], "betta: 1", {}), ([], "", {"betta": 1})],
    ids=["flag", "profile", "RECIPE"],
)
def test_an_unknown_key_anywhere_is_refused_by_name(parse, flags, profile, settings):
    with pytest.raises(RecipeError, match="betta"):
        parse(*flags, profile=profile, **settings)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss_type", "sigmoid", "--loss_weights", "1", "2"], "loss_weights"),
        (["--gradient_accumulation_steps", "2"], "follow from pairs_per_update"),
        (["--pairs_per_update", "62"], "not a multiple of per_device_train_batch_size=4"),
        (["--pairs_per_update", "0"], "not a multiple"),
        (["--load_in_4bit", "true", "--load_in_8bit", "true"], "8 bit and 4 bit"),
        (["--resume_from_checkpoint", "nowhere"], "no checkpoint nowhere"),
        (["--bf16", "true", "--use_cpu", "false"], "profile cpu"),
        (["--gradient_checkpointing", "true"], "is called activation_checkpointing"),
        (["--gradient-checkpointing", "true"], "is called activation_checkpointing"),
        (["--output_dir", "some/model"], "is the initial model"),
        (["--bet", "0.3"], "bet"),
    ],
)
def test_a_value_that_cannot_work_is_refused_before_a_model_is_loaded(parse, flags, message):
    with pytest.raises(RecipeError, match=message):
        parse(*flags)


def test_a_command_line_that_is_given_is_read_and_the_process_keeps_its_own(parse, monkeypatch):
    parse()  # in an empty folder, from the command line of the process
    Path("mine.py").touch()
    words = ["dpo-recipes", "evaluate", "--beta", "0.7"]
    monkeypatch.setattr(sys, "argv", [*words])
    on_cpu = dict(use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none")
    recipe = dict(model_name_or_path="some/model", **on_cpu, beta=0.1)
    _, args, _ = parse_recipe(recipe, TYPES, argv=["mine.py", "--config", "profile.yaml", "--output_dir", "mine"])
    assert (args.beta, args.output_dir, args.seed) == (0.1, "mine", 42)
    with pytest.raises(RecipeError, match=r"betta.*`\S*python\S* mine.py --help`"):
        parse_recipe(recipe, TYPES, argv=["mine.py", "--betta", "1"])
    assert sys.argv == words


def test_an_older_name_in_a_profile_is_refused(parse):
    with pytest.raises(RecipeError, match="is called activation_checkpointing"):
        parse(profile="gradient_checkpointing: true")


def test_a_missing_profile_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--config", "nowhere.yaml"])
    with pytest.raises(RecipeError, match=r"nowhere\.yaml"):
        parse_recipe({}, TYPES)


@pytest.mark.parametrize(("pairs", "batch", "expected"), [(64, 4, 16), (64, 64, 1), (8, 2, 4)])
def test_gradient_accumulation_follows_from_pairs_per_update(parse, pairs, batch, expected):
    _, args, _ = parse("--pairs_per_update", str(pairs), "--per_device_train_batch_size", str(batch))
    assert args.gradient_accumulation_steps == expected


@pytest.mark.parametrize(
    ("flags", "profile", "expected"),
    [
        ("--tokens_per_step 4096", "", (4, 16, 4096)),
        ("", "tokens_per_step: 4096\nper_device_train_batch_size: 8", (8, 8, 4096)),
        ("--pairs_per_update 6", "tokens_per_step: 4096", (1, 6, 4096)),
        ("--per_device_train_batch_size 2", "tokens_per_step: 4096", (2, 32, None)),
        ("--tokens_per_step 4096", "per_device_train_batch_size: 8", (8, 8, 4096)),
        ("--tokens_per_step 0", "tokens_per_step: 4096\nper_device_train_batch_size: 8", (8, 8, 0)),
        ("--tokens_per_step auto", "tokens_per_step: 4096\nper_device_train_batch_size: 8", (8, 8, "auto")),
    ],
)
def test_a_token_budget_holds_unless_a_batch_was_given_later(parse, flags, profile, expected, capsys):
    script_args, args, _ = parse(*flags.split(), profile=profile)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.tokens_per_step) == expected
    assert script_args.settings["tokens_per_step"] == script_args.tokens_per_step == args.tokens_per_step
    assert ("takes the place of tokens_per_step" in capsys.readouterr().out) == (expected[2] is None)


def test_a_profiles_token_budget_is_dropped_where_weights_are_divided_among_processes(parse, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    script_args, args, _ = parse(profile="tokens_per_step: 4096\nper_device_train_batch_size: 8")
    assert (args.per_device_train_batch_size, script_args.tokens_per_step) == (8, None)


@pytest.mark.parametrize("wrong", ["-1", "1e4", "many", "true"])
def test_a_token_budget_is_a_number_or_auto(parse, wrong):
    with pytest.raises(RecipeError, match=f"tokens_per_step is {wrong}. It counts tokens at a time: 8192 .*auto"):
        parse("--tokens_per_step", wrong)


def test_activation_checkpointing_is_left_to_the_estimate_where_nobody_gave_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = dict(model_name_or_path="some/model", output_dir="outputs/x", use_cpu=True, bf16=False, report_to="none")
    argv = ["recipe.py"]
    for flags, expected in (([], "auto"), (["--activation_checkpointing", "true"], True)):
        script_args, _, _ = parse_recipe(recipe, (RecipeArguments, DPOConfig, ModelConfig), argv=[*argv, *flags])
        assert script_args.settings["activation_checkpointing"] == expected


def test_log_probs_and_gradients_leave_fsdp2_in_float32(parse, monkeypatch):
    _, args, _ = parse("--bf16", "true")
    assert args.fsdp_plugin_args is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    _, args, _ = parse("--bf16", "true")
    policy = args.fsdp_plugin_args["mixed_precision_policy"]
    dtypes = (policy.param_dtype, policy.reduce_dtype, policy.output_dtype)
    assert dtypes == (torch.bfloat16, torch.float32, torch.float32)


def test_a_token_budget_and_a_batch_in_one_command_are_refused(parse):
    with pytest.raises(RecipeError, match="exclude one another"):
        parse("--tokens_per_step", "4096", "--per_device_train_batch_size", "4")


@pytest.mark.parametrize("kind", [SFTConfig, RewardConfig])
def test_a_token_budget_is_dpos_alone(kind, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = dict(model_name_or_path="some/model", output_dir="outputs/x", activation_checkpointing=False)
    (tmp_path / "profile.yaml").write_text("tokens_per_step: 4096\nper_device_train_batch_size: 8\nbf16: false")
    argv = ["recipe.py", "--config", "profile.yaml", "--use_cpu", "true"]
    script_args, args, _ = parse_recipe(recipe, (RecipeArguments, kind, ModelConfig), argv=argv)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 8)
    assert script_args.settings["tokens_per_step"] is None
    with pytest.raises(RecipeError, match="tokens_per_step has no effect here: only DPO"):
        parse_recipe(recipe, (RecipeArguments, kind, ModelConfig), argv=[*argv, "--tokens_per_step", "4096"])


@pytest.fixture(params=[RLOOConfig, PPOConfig])
def parse_online(request, monkeypatch, tmp_path):
    """Parses a small recipe that samples answers, for one of the trainers and so many processes."""
    monkeypatch.chdir(tmp_path)
    recipe = dict(
        model_name_or_path="some/model",
        reward_model_name_or_path="some/reward",
        output_dir="outputs/x",
        beta=0.1,
        pairs_per_update=16,
        num_generations=2,
        num_generations_eval=1,
        per_device_train_batch_size=4,
        **{"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none"},
    )

    def parse(*flags, processes=1, **settings):
        monkeypatch.setattr(TrainingArguments, "world_size", processes)
        monkeypatch.setattr(sys, "argv", ["recipe.py", *flags])
        return parse_recipe(recipe | settings, (OnlineArguments, request.param, ModelConfig))

    return parse


@pytest.mark.parametrize(
    ("batch", "processes", "answers", "accumulation", "batches"),
    [(4, 1, 64, 4, 16), (2, 2, 64, 4, 16), (16, 1, 16, 1, 1), (1, 2, 32, 8, 16)],
)
def test_a_rollout_is_learned_from_in_whole_updates(parse_online, batch, processes, answers, accumulation, batches):
    flags = ["--per_device_train_batch_size", str(batch), "--generation_batch_size", str(answers)]
    _, args, _ = parse_online(*flags, processes=processes)
    assert (args.gradient_accumulation_steps, args.steps_per_generation) == (accumulation, batches)
    assert args.generation_batch_size == answers


def test_a_token_budget_of_answers_is_a_flag_of_its_own(parse_online, tmp_path):
    script_args, args, _ = parse_online("--tokens_per_step", "4096")
    assert args.tokens_per_step == script_args.settings["tokens_per_step"] == 4096
    (tmp_path / "profile.yaml").write_text("tokens_per_step: 4096\nper_device_train_batch_size: 8")
    _, args, _ = parse_online("--config", "profile.yaml")  # where the number of answers is that of PPO and RLOO
    assert (args.tokens_per_step, args.per_device_train_batch_size) == (None, 8)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_rollout_is_one_update_unless_it_is_said(parse_online, processes):
    _, args, _ = parse_online(processes=processes)
    assert args.generation_batch_size == 16
    assert args.steps_per_generation == args.gradient_accumulation_steps == 4 // processes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--generation_batch_size", "24"], "must be a multiple of pairs_per_update=16"),
        (["--generation_batch_size", "8"], "must be a multiple of pairs_per_update=16"),
        (["--steps_per_generation", "4"], "steps_per_generation has no effect here: it follows from"),
        (["--shared_prefix", "false"], "shared_prefix has no effect here: only DPO"),
        (["--train_sampling_strategy", "group_by_length"], "train_sampling_strategy has no effect here"),
        (["--max_length", "512"], "max_length"),
        (["--output_dir", "some/reward"], "is the reward model, which the run would replace"),
        (["--use_peft", "true", "--lora_task_type", "SEQ_CLS"], "needs CAUSAL_LM"),
        (["--gradient_accumulation_steps", "2"], "follow from pairs_per_update"),
    ],
)
def test_what_an_online_recipe_cannot_do_is_refused(parse_online, flags, message):
    with pytest.raises(RecipeError, match=message):
        parse_online(*flags)


def test_the_score_head_of_a_reward_model_must_be_trained(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--use_cpu", "true", "--bf16", "false"])
    recipe = dict(model_name_or_path="some/model", output_dir="outputs/x", activation_checkpointing=False, **LORA)
    with pytest.raises(RecipeError, match="lora_task_type is CAUSAL_LM, and RewardConfig needs SEQ_CLS"):
        parse_recipe(recipe, (RecipeArguments, RewardConfig, ModelConfig))
    parse_recipe(recipe | {"lora_task_type": "SEQ_CLS"}, (RecipeArguments, RewardConfig, ModelConfig))


def test_of_a_recipes_settings_the_narrower_class_counts():
    namespace = {part.__name__: part for part in (RecipeArguments, OnlineArguments, PPOConfig, ModelConfig)}
    assert set(argument_classes(namespace)) == {OnlineArguments, PPOConfig, ModelConfig}
    assert set(argument_classes({"a": RecipeArguments, "b": DPOConfig})) == {RecipeArguments, DPOConfig}


def test_recipe_arguments_stay_few():
    """A dozen of our own at most, and no more than three for online recipes alone."""
    trls, fields = ScriptArguments.__dataclass_fields__, RecipeArguments.__dataclass_fields__
    ours = [name for name, entry in fields.items() if entry.init and name not in trls]
    assert "pairs_per_update" in ours
    assert len(ours) <= 12
    assert len(set(OnlineArguments.__dataclass_fields__) - set(fields)) <= 3


def test_model_settings_reach_the_trainer(parse):
    _, args, _ = parse("--dtype", "bfloat16", "--model_revision", "v2")
    assert args.model_init_kwargs == {"revision": "v2", "attn_implementation": None, "dtype": "bfloat16"}


def test_presets_are_fields_of_model_config():
    assert ModelConfig(**LORA).lora_target_modules == "all-linear"
    quantised = ModelConfig(**QLORA)
    assert (quantised.load_in_4bit, quantised.bnb_4bit_quant_type, quantised.use_bnb_nested_quant) == (
        True,
        "nf4",
        True,
    )
    assert quantised.dtype == "bfloat16"


def test_settings_are_those_in_force_and_hold_no_secret(parse):
    script_args, _, _ = parse("--beta", "0.3", "--hub_token", "secret")
    assert script_args.settings["beta"] == 0.3
    assert "secret" not in json.dumps(script_args.settings)


def test_the_settings_hash_ignores_bookkeeping_and_sees_the_rest(parse):
    base = settings_hash(parse()[0].settings)
    assert settings_hash(parse("--output_dir", "elsewhere", "--logging_steps", "3")[0].settings) == base
    assert settings_hash(parse("--beta", "0.2")[0].settings) != base
    assert settings_hash(parse("--seed", "1")[0].settings) != base


@pytest.fixture
def held_run(parse, tmp_path):
    """The output folder with a run that was begun there with the settings of `parse`."""
    folder = tmp_path / "outputs" / "x"
    settings = parse()[0].settings
    claim(folder)
    write_json(folder / "settings.json", settings)
    return folder


def checkpoint_in(folder, step, *, without=()):
    """A checkpoint with the files that transformers writes, listed as the run's."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    save_file({"weight": torch.arange(100.0)}, checkpoint / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        if name not in without:
            torch.save({"step": step}, checkpoint / name)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    settle(folder, checkpoint.name)
    return checkpoint


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_output_folder_that_holds_another_run_is_refused(parse, held_run):
    write_json(held_run / "done.json", {"updates": 3})
    with pytest.raises(RecipeError, match=r"another run, which differs in beta: 0\.1 -> 0\.3.*--overwrite true"):
        parse("--beta", "0.3")
    parse("--beta", "0.3", "--overwrite", "true")


@pytest.mark.parametrize("flags", [[], ["--resume_from_checkpoint", "true"], ["--logging_steps", "3"]], ids=" ".join)
def test_a_finished_run_says_so_and_is_left_as_it_is(parse, held_run, flags, capsys):
    write_json(held_run / "done.json", {"updates": 3, "request": None})
    write_json(held_run / "eval.json", {"win_rate": 0.7})
    before = contents(held_run)
    with pytest.raises(SystemExit) as caught:
        parse(*flags)
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert "outputs/x holds this run, finished: nothing to do. Its page is missing: dpo-recipes page outputs/x." in said
    assert contents(held_run) == before


def test_a_finished_run_of_other_data_is_not_taken_for_the_one_that_is_asked_for(parse, held_run, monkeypatch):
    write_json(held_run / "done.json", {"request": "of the rows as they were"})
    monkeypatch.setenv("DPO_RECIPES_REQUEST", "of other rows")
    with pytest.raises(RecipeError, match="a finished run of other data, code or flags"):
        parse()


def test_a_finished_run_can_be_trained_for_longer(parse, held_run):
    checkpoint_in(held_run, 10)
    write_json(held_run / "done.json", {"updates": 10})
    _, args, _ = parse("--resume_from_checkpoint", "true", "--max_steps", "20")
    assert args.resume_from_checkpoint == "outputs/x/checkpoint-10"


def test_an_unfinished_run_is_continued_or_replaced_never_mixed(parse, held_run):
    checkpoint_in(held_run, 10)
    with pytest.raises(RecipeError, match=r"unfinished.*--resume_from_checkpoint true"):
        parse()
    parse("--overwrite", "true")
    with pytest.raises(RecipeError, match="Give one of them"):
        parse("--overwrite", "true", "--resume_from_checkpoint", "true")


def test_a_run_that_was_killed_in_its_first_checkpoint_starts_again(parse, held_run, capsys):
    declare(held_run, "checkpoint-10")
    (held_run / "checkpoint-10").mkdir()
    (held_run / "checkpoint-10" / "model.safetensors").write_bytes(b"half")
    assert parse("--resume_from_checkpoint", "true")[1].resume_from_checkpoint is None
    assert "no checkpoint to go on from" in capsys.readouterr().out
    with pytest.raises(RecipeError, match=r"another run, which differs in beta"):
        parse("--resume_from_checkpoint", "true", "--beta", "0.3")
    parse("--overwrite", "true")


UNUSABLE = {
    "weights alone": (["optimizer.pt", "scheduler.pt", "rng_state.pth"], "saved without its optimizer"),
    "no random state": (["rng_state.pth"], r"half-written \(rng_state\*.pth is missing\)"),
    "damaged": ([], r"half-written \(model.safetensors is cut short\)"),
}


@pytest.mark.parametrize("name", ["true", "outputs/x/checkpoint-20"])
@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_resume_without_a_usable_checkpoint_is_refused_and_changes_nothing(parse, held_run, kind, name):
    without, words = UNUSABLE[kind]
    for step in (10, 20):
        checkpoint = checkpoint_in(held_run, step, without=without)
        if kind == "damaged":
            (checkpoint / "model.safetensors").write_bytes(b"half")
    before = contents(held_run)
    with pytest.raises(RecipeError, match=f"checkpoint-20 is {words}.*Start again with --overwrite true, or"):
        parse("--resume_from_checkpoint", name)
    assert contents(held_run) == before
    parse("--overwrite", "true")


def test_weights_alone_are_trained_on_from_by_their_name(parse, held_run):
    checkpoint = checkpoint_in(held_run, 20, without=UNUSABLE["weights alone"][0])
    with pytest.raises(RecipeError, match="--model_name_or_path outputs/x/checkpoint-20"):
        parse("--resume_from_checkpoint", "true")
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError, match="dpo-recipes merge outputs/x/checkpoint-20 --output_dir outputs/x_checkpo"):
        parse("--resume_from_checkpoint", "true")


def of_a_project(folder):
    for name in ("README.md", "config.json", "settings.json", "report.html"):
        (folder / name).write_text("{}")


def of_a_dataset(folder):
    (folder / "rows.jsonl").write_text("{}\n")


def of_a_checkout(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: main")


def of_a_model(folder):
    (folder / "model.safetensors").write_bytes(b"weights")


def of_another_run(folder):
    (folder / "checkpoint-10").mkdir()


def of_a_link(folder):
    (folder / "README.md").symlink_to(folder.parent / "notes.md")


@pytest.mark.parametrize("fill", [of_a_project, of_a_dataset, of_a_checkout, of_a_model, of_another_run, of_a_link])
@pytest.mark.parametrize("flags", [[], ["--overwrite", "true"]], ids=["", "overwrite"])
@pytest.mark.parametrize("place", ["mine", "."])
def test_a_folder_that_holds_what_no_run_wrote_is_refused(parse, fill, flags, place, tmp_path):
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    fill(folder)
    before = contents(folder)
    with pytest.raises(RecipeError, match=r"holds .*which no run wrote.*Choose another --output_dir"):
        parse(*flags, "--output_dir", place)
    assert {name: text for name, text in contents(folder).items() if "profile" not in name} == before


def test_a_resume_elsewhere_never_takes_a_folder_of_the_user(parse, held_run, tmp_path):
    checkpoint_in(held_run, 10)
    (tmp_path / "mine").mkdir()
    of_a_project(tmp_path / "mine")
    with pytest.raises(RecipeError, match=r"mine holds .*which no run wrote"):
        parse("--output_dir", "mine", "--resume_from_checkpoint", "outputs/x/checkpoint-10")
    shutil.copytree(held_run / "checkpoint-10", tmp_path / "mine" / "checkpoint-10")
    with pytest.raises(RecipeError, match=r"mine holds .*which no run wrote"):
        parse("--output_dir", "mine", "--resume_from_checkpoint", "true")


def test_an_output_path_that_is_a_file_is_refused(parse, tmp_path):
    (tmp_path / "outputs").write_text("")
    with pytest.raises(RecipeError, match="is a file"):
        parse("--output_dir", "outputs")


def test_resuming_without_a_checkpoint_starts_at_step_0(parse, capsys):
    _, args, _ = parse("--resume_from_checkpoint", "true")
    assert args.resume_from_checkpoint is None
    assert "starting at step 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("outputs/quickstart_sft", "dpo-recipes train quickstart-sft"),
        ("./nowhere", "There is no model in ./nowhere. Check the path"),
        ("some/model", "--model_name_or_path, or run the quickstart"),
        (".", "holds no config.json"),
    ],
)
def test_a_model_that_is_not_there_names_the_way_out(name, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_tokenizer(ModelConfig(model_name_or_path=name), SFTConfig(use_cpu=True, bf16=False, **NO_WARNING))
    assert message in str(caught.value)


NO_WARNING = {"activation_checkpointing": False}


def test_a_lora_adapter_alone_is_no_start(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(RecipeError, match="holds a LoRA adapter alone"):
        load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)), SFTConfig(use_cpu=True, bf16=False, **NO_WARNING))


def test_a_reward_model_is_no_start_for_a_language_model(tiny_model, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    model, settings = ModelConfig(model_name_or_path=str(tmp_path)), dict(use_cpu=True, bf16=False, **NO_WARNING)
    with pytest.raises(RecipeError, match="holds a reward model"):
        load_tokenizer(model, SFTConfig(**settings))
    assert load_tokenizer(model, RewardConfig(**settings)).eos_token == "<eos>"


def test_sft_takes_its_chat_template_from_a_file(tiny_model, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(CHAT_TEMPLATE.replace("Bot", "Robot"))
    args = SFTConfig(use_cpu=True, bf16=False, chat_template_path=str(template), **NO_WARNING)
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(tiny_model)), args)
    assert "Robot" in tokenizer.chat_template


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RecipeError("got this, needs that, do so"), 2, "got this"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "A disk is full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), 1, "A disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), 1, "A disk is full"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (ValueError("Please pass the argument `trust_remote_code=True` to allow it"), 2, "--trust_remote_code true"),
        (ValueError("Target modules {'nose'} not found in the base model."), 2, "lora_target_modules names no module"),
        (OSError("We couldn't connect to 'https://huggingface.co' to load the files"), 2, "Cannot load"),
    ],
)
def test_a_run_ends_with_one_message_and_its_status(error, status, message, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == status
    assert message in capsys.readouterr().err


def test_any_other_error_keeps_its_traceback():
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main)


def test_a_full_disk_of_the_cache_asks_for_no_fewer_checkpoints(capsys):
    def main():
        writer = ArrowWriter(path="/dev/full", features=Features({"text": Value("string")}))
        writer.write_table(pa.table({"text": ["x" * 1000] * 10_000}))
        writer.finalize()

    with pytest.raises(SystemExit) as caught:
        run(main)
    told = capsys.readouterr().err
    assert caught.value.code == 1
    assert "HF_HOME" in told
    assert "save_total_limit" not in told


@pytest.mark.parametrize("config", [LlamaConfig, GPT2Config], ids=["refused", "made of nothing"])
def test_a_model_without_its_tokenizer_is_refused_by_name(config, tmp_path):
    config(vocab_size=99).save_pretrained(tmp_path)  # transformers has an empty tokenizer for one of them
    with pytest.raises(RecipeError, match=r"There is no tokenizer beside the model.*save_pretrained"):
        load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)), SFTConfig(use_cpu=True, bf16=False, **NO_WARNING))


def test_a_tokenizer_with_code_of_its_own_runs_only_if_the_user_says_so(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    own = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(RecipeError, match=r"has code of its own.*--trust_remote_code true"):
        load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)), SFTConfig(use_cpu=True, bf16=False, **NO_WARNING))
