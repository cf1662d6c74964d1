"""Reads the settings of a recipe and loads its tokenizer."""

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import DPOConfig, ModelConfig, RewardConfig, ScriptArguments, TrlParser

from dpo_recipes.catalog import list_recipes, read_yaml
from dpo_recipes.dataset_adapters.ledger import HELD_OUT
from dpo_recipes.ending import NO_TOKENIZER, SECRETS, unreachable
from dpo_recipes.ending import run as run  # recipes import it from here
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import check_writable, read_json
from dpo_recipes.flags import grouped, says_no
from dpo_recipes.manifest import finished_run, refuse_strangers, was_cut_short
from dpo_recipes.models.checkpoints import WEIGHTS_ALONE, checkpoints_of, incomplete_reason, latest_checkpoint
from dpo_recipes.models.open import check_weights, full_model
from dpo_recipes.secrecy import hide, hide_flags, secrets_of, take_secrets
from dpo_recipes.settings import check_settings, effective_settings, settings_differences
from dpo_recipes.terminal import duration, say, this_python
from dpo_recipes.tracking import check_hub, check_trackers

FLAG = 2  # the place of a setting that a flag gave

SETTINGS_FILE = "settings.json"
DONE_FILE = "done.json"


class FinishedRun(SystemExit):
    """Ends a recipe with status 0: its output folder holds the same run, finished."""


def _one_of(default: str | None, *others: str, help: str) -> Any:
    """A setting that is one of some words, by default the first."""
    return HfArg(default=default, metadata={"choices": [*filter(None, (default, *others))]}, help=help)


@dataclass
class RecipeArguments(ScriptArguments):
    """The few settings that no TRL dataclass has a field for."""

    pairs_per_update: int = HfArg(default=64, help="Pairs per optimizer step; gradient accumulation follows from it.")
    tokens_per_step: int | str | None = HfArg(
        default=None,
        help="DPO, PPO, RLOO: most tokens at a time; divides an update. auto: as memory allows. 0 counts rows instead.",
    )
    eval_pairs: int = HfArg(default=512, help="Held-out pairs to evaluate on, drawn by seed where there are more.")
    held_out: float = HfArg(default=HELD_OUT, help="Share of the prompts to hold out of data without a test split.")
    columns: str | None = HfArg(default=None, help="Your columns: prompt=instruction,chosen=good,rejected=bad.")
    control_tokens_as_text: bool = HfArg(default=False, help="Break up control tokens in messages into plain text.")
    part: str | None = _one_of(None, "learn", "judge", help="Two thirds of the training prompts, or the rest.")
    overwrite: bool = HfArg(default=False, help="Replace the run that the output folder holds.")
    dry_run: str = HfArg(
        default="false",
        metadata={"nargs": "?", "const": "true"},
        help="true: print settings, account and needs, start nothing. A number: time so many updates, too.",
    )
    threshold: list[str] | None = field(default=None, metadata={"help": "Where the preflight warns: longer=0.8."})
    shared_prefix: str = _one_of("auto", "true", "false", help="Encode prompts once: auto where tested.")
    health: str = _one_of("warn", "stop", "off", help="Say what goes wrong, or stop if fatal.")
    settings: dict[str, Any] = field(init=False, default_factory=dict)
    """All settings in force, set by `parse_recipe`; not a flag."""

    def __post_init__(self) -> None:
        """Raises ValueError unless `dry_run` is true, false or a number of updates, and `tokens_per_step` a budget."""
        if not (says_no(self.dry_run) or re.fullmatch("true|t|yes|y|[0-9]+", str(self.dry_run).lower())):
            raise ValueError(f"dry_run is {self.dry_run}. Give true, false, or the number of updates to time.")
        if self.tokens_per_step not in (None, "auto"):
            if not str(self.tokens_per_step).isdecimal():
                raise ValueError(
                    f"tokens_per_step is {self.tokens_per_step}. It counts tokens at a time: 8192 to begin with on a "
                    "card of 24 GB, auto for as many as memory allows, 0 to count rows with "
                    "per_device_train_batch_size."
                )
            self.tokens_per_step = int(self.tokens_per_step)

    @property
    def is_dry_run(self) -> bool:
        """True if nothing is to be started or kept."""
        return not says_no(self.dry_run)

    @property
    def timed_updates(self) -> int:
        """Number of updates that a dry run makes to estimate the time."""
        return int(self.dry_run) if str(self.dry_run).isdigit() else 0


@dataclass
class OnlineArguments(RecipeArguments):
    """Settings of a recipe that samples answers and scores them; `pairs_per_update` of PPO and RLOO counts answers."""

    reward_model_name_or_path: str | None = HfArg(default=None, help="Reward model that scores the answers.")
    max_prompt_length: int = HfArg(default=512, help="Most tokens of a prompt. Its oldest turns go first.")
    max_pair_length: int | None = HfArg(default=None, help="Take the prompts of the pairs that fit into these tokens.")


@dataclass
class _LoadedByName:
    """Settings of a profile that have no effect on a recipe without ModelConfig, which makes its own model."""

    dtype: str | None = None
    attn_implementation: str | None = None


def argument_classes(namespace: Mapping[str, Any]) -> list[type]:
    """The dataclasses of settings of a recipe file, in this order: RecipeArguments, a TRL config, ModelConfig."""
    classes = [value for value in namespace.values() if isinstance(value, type)]
    kinds = (RecipeArguments, TrainingArguments, ModelConfig)
    parts = [part for kind in kinds for part in classes if issubclass(part, kind)]
    return [part for part in parts if not any(part in other.__mro__[1:] for other in parts)]  # no base of another


def parse_recipe(
    recipe: Mapping[str, Any],
    dataclass_types: Sequence[type],
    *,
    argv: Sequence[str] | None = None,
    to_train: bool = True,
) -> tuple[Any, ...]:
    """An instance of each dataclass, from RECIPE < `--config profile.yaml` < flags.

    Sets what follows from other settings: gradient accumulation from `pairs_per_update`, `model_init_kwargs` from
    ModelConfig, and the checkpoint to resume from. Nothing is written and no model is loaded.

    Args:
        recipe: The RECIPE of a recipe file.
        dataclass_types: RecipeArguments, a TRL config and, where a model is loaded by name, ModelConfig.
        argv: The command line, the recipe's file first; by default the command line of this process.
        to_train: Look at what the output folder holds.

    Raises:
        RecipeError: If a key is unknown anywhere, a value is refused, the pairs per update cannot be met, the output
            folder holds anything but this run, or no checkpoint there can be resumed from.
        FinishedRun: If the output folder holds this run, finished.
    """
    argv = list(sys.argv if argv is None else argv)
    SECRETS.update(secrets_of(argv))
    parsed, given = _parse(recipe, dataclass_types, argv)
    sys.argv[1:] = hide_flags(sys.argv[1:])  # trackers keep the command line
    script_args = next(args for args in parsed if isinstance(args, RecipeArguments))
    training_args = next(args for args in parsed if isinstance(args, TrainingArguments))
    take_secrets(training_args)
    check_trackers(training_args)
    check_hub(training_args)
    _set_fsdp_precision(training_args)
    _set_accumulation(script_args, training_args, given)
    if isinstance(script_args, OnlineArguments) and not isinstance(training_args, DPOConfig):
        _set_rollout(script_args, training_args, given)
    for model_args in (args for args in parsed if isinstance(args, ModelConfig)):
        _set_model(script_args, training_args, model_args, keep_dtype=given.get("dtype") == FLAG)
    script_args.settings = effective_settings(parsed) | {"request": os.environ.get("DPO_RECIPES_REQUEST")}
    if "activation_checkpointing" not in given:
        script_args.settings["activation_checkpointing"] = "auto"  # `preflight.decide` sets it by the memory estimate
    if to_train:
        _look_at_folder(script_args, training_args)
        if script_args.settings["request"]:  # by the launcher, which has said that they are loaded
            say(f"The libraries took {duration(time.process_time())} of CPU time. Reading the data ...")
    return parsed


def _parse(
    recipe: Mapping[str, Any], dataclass_types: Sequence[type], argv: list[str]
) -> tuple[tuple[Any, ...], dict[str, int]]:
    """The dataclasses, and for each setting that was given its place: 0 RECIPE, 1 profile, 2 flags."""
    flags = dict(grouped(argv[1:]))
    file = Path(*flags.get("config", ()))
    profile = read_yaml(file) if file.is_file() else {}  # the parser refuses a file that is missing
    given = {name: place for place, names in enumerate((recipe, profile, flags)) for name in names}
    for old in given.keys() & {"gradient_checkpointing", "gradient_checkpointing_kwargs"}:
        # Accepted by transformers, and without effect beside a profile's newer name.
        raise RecipeError(f"{old} is called {old.replace('gradient', 'activation')} today. Use that name.")
    loads_by_name = any(issubclass(part, ModelConfig) for part in dataclass_types)
    parts = [*dataclass_types, *([] if loads_by_name else [_LoadedByName])]
    usage = "%(prog)s [--config PROFILE.yaml] [--SETTING VALUE ...]"  # the full one would bury an error's one line
    parser = TrlParser(parts, allow_abbrev=False, prog=Path(argv[0]).name, usage=usage)
    parser.set_defaults_with_config(activation_checkpointing=True)  # TRL's own default, by its deprecated name
    if unknown := parser.set_defaults_with_config(**recipe):
        raise RecipeError(f"RECIPE has keys that TRL does not know: {' '.join(unknown)}. Correct or remove them.")
    parser.set_defaults_with_config(**profile)
    check_settings(vars(parser.parse_known_args(argv[1:])[0]), dataclass_types, given)
    try:
        parsed: tuple[Any, ...] = parser.parse_args_and_config(argv[1:])[: len(dataclass_types)]
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError) as error:
        hint = " Use the profile cpu without a GPU, turing on a card without bfloat16." if "bf16" in str(error) else ""
        listed = f". `{this_python()} {argv[0]} --help` lists the settings." if Path(argv[0]).is_file() else ""
        raise RecipeError(hide(f"{error}{hint}", SECRETS) + listed) from error
    if not loads_by_name and (unused := {*flags, *recipe} & {entry.name for entry in fields(_LoadedByName)}):
        raise RecipeError(f"{unused.pop()} has no effect here: this recipe makes its own model. Leave it out.")
    return parsed, given


def _set_fsdp_precision(training_args: TrainingArguments) -> None:
    """Lets log-probs and gradients leave FSDP2's 16-bit layers in float32.

    accelerate 1.15 rounds them to 16 bits: a completion's log-prob of -122.3 nats to -122.5, and the margins with it.
    """
    if (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("FSDP_VERSION")) != ("true", "2"):
        return
    if dtype := torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
        training_args.fsdp_plugin_args = {"mixed_precision_policy": policy, **(training_args.fsdp_plugin_args or {})}


def _set_accumulation(script_args: RecipeArguments, training_args: TrainingArguments, given: Mapping[str, int]) -> None:
    """Sets the gradient accumulation that `pairs_per_update` needs with this batch and number of processes.

    With `tokens_per_step` any batch will do: SharedPrefixDPOTrainer takes the pairs of an update at once and divides
    them by tokens. A plain DPOTrainer takes the batches as they are.
    """
    if training_args.gradient_accumulation_steps != 1 or training_args.auto_find_batch_size:
        raise RecipeError(
            "gradient_accumulation_steps and auto_find_batch_size follow from pairs_per_update here. Set "
            "--pairs_per_update, and --tokens_per_step or --per_device_train_batch_size instead."
        )
    pairs, processes = script_args.pairs_per_update, training_args.world_size
    _keep_one_size(script_args, training_args, given)
    batch = training_args.per_device_train_batch_size
    if script_args.tokens_per_step and pairs % (batch * processes):
        batch = training_args.per_device_train_batch_size = 1
    steps, rest = divmod(pairs, batch * processes)
    if rest or steps < 1:
        raise RecipeError(
            f"pairs_per_update={pairs} is not a multiple of per_device_train_batch_size={batch} times "
            f"{processes} process(es). Change one of them."
        )
    training_args.gradient_accumulation_steps = steps


def _keep_one_size(script_args: RecipeArguments, training_args: Any, given: Mapping[str, int]) -> None:
    """Drops the token budget where updates cannot be divided or the number of rows at a time was given later.

    FSDP and DeepSpeed drop a profile's budget, too.

    In one place, as in a profile for all recipes, the budget is DPO's and the number of rows the others'.
    """
    tokens, pairs = (given.get(name, -1) for name in ("tokens_per_step", "per_device_train_batch_size"))
    if script_args.tokens_per_step and tokens == pairs == FLAG:
        raise RecipeError("tokens_per_step and per_device_train_batch_size exclude one another. Give one of them.")
    is_dpo = isinstance(training_args, DPOConfig)
    is_online = isinstance(script_args, OnlineArguments)
    sharded = "true" in map(os.environ.get, ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))
    dropped = pairs > tokens or (sharded and tokens < FLAG)  # processes that share weights take equally many passes
    if script_args.tokens_per_step and dropped and (is_dpo or is_online):
        why = ": processes that divide weights must take equally many passes" if sharded else ""
        say(f"per_device_train_batch_size takes the place of tokens_per_step{why}.")
    if dropped or not (is_dpo or (is_online and tokens > pairs)):
        script_args.tokens_per_step = None
    training_args.tokens_per_step = script_args.tokens_per_step  # where the trainers find it


def _set_rollout(script_args: OnlineArguments, training_args: Any, given: Mapping[str, int]) -> None:
    """Sets the answers of a rollout, by default as many as an update takes, and the batches they are divided into."""
    if "generation_batch_size" not in given:
        training_args.generation_batch_size = script_args.pairs_per_update
    answers, group = training_args.generation_batch_size, training_args.num_generations
    update = script_args.pairs_per_update
    if answers % update or answers % group:
        raise RecipeError(
            f"A rollout of generation_batch_size={answers} answers must be a multiple of pairs_per_update={update}, "
            f"the answers of an update, and of num_generations={group}, the answers to a prompt. Change one of them."
        )
    at_a_time = training_args.per_device_train_batch_size * training_args.world_size
    training_args.steps_per_generation = answers // at_a_time  # pairs_per_update is a multiple of it


def _set_model(script_args: RecipeArguments, training_args: Any, model_args: ModelConfig, *, keep_dtype: bool) -> None:
    """Checks what ModelConfig says, and hands it to the trainer as `model_init_kwargs`."""
    needed = "SEQ_CLS" if isinstance(training_args, RewardConfig) else "CAUSAL_LM"
    if model_args.use_peft and model_args.lora_task_type != needed:
        raise RecipeError(
            f"lora_task_type is {model_args.lora_task_type}, and {type(training_args).__name__} needs {needed}: a "
            "score head is trained and saved with SEQ_CLS alone. Set it in RECIPE or with --lora_task_type."
        )
    attention = model_args.attn_implementation
    known = {"eager", *ALL_ATTENTION_FUNCTIONS.keys()}  # and the functions that a recipe has registered
    if attention and "/" not in attention and attention.rpartition("|")[2] not in known:
        raise RecipeError(f"There is no attn_implementation {attention}. There are: {', '.join(sorted(known))}.")
    if model_args.model_name_or_path is None:
        raise RecipeError("No model is named. Give a folder or a Hub name with --model_name_or_path.")
    if not keep_dtype:
        _load_as_saved(script_args, model_args)
    how = {"revision": model_args.model_revision, "attn_implementation": attention, "dtype": model_args.dtype}
    training_args.model_init_kwargs = how | (training_args.model_init_kwargs or {})


def _load_as_saved(script_args: RecipeArguments, model_args: ModelConfig) -> None:
    """Lets a float32 model of an earlier run keep its dtype, where a profile would round off what training changed."""
    if model_args.dtype not in ("bfloat16", "float16") or model_args.load_in_4bit or model_args.load_in_8bit:
        return
    folders = [model_args.model_name_or_path, getattr(script_args, "reward_model_name_or_path", None)]
    for folder in [Path(name) for name in folders if name]:
        ours = (folder / DONE_FILE).exists() or (folder / "merge.json").exists()
        if ours and read_json(folder / "config.json").get("dtype") == "float32":
            say(
                f"{folder} was saved in float32 and is loaded so: {model_args.dtype} would round off part of what it "
                f"learned. --dtype {model_args.dtype} does so all the same, for half the memory."
            )
            model_args.dtype = "auto"
            return


def _look_at_folder(script_args: RecipeArguments, training_args: TrainingArguments) -> None:
    """Sets the checkpoint to resume from, and refuses an output folder that holds something other than this run.

    A dry run says what would be refused.
    """
    folder, wanted = Path(training_args.output_dir), training_args.resume_from_checkpoint
    asked = str(wanted or "false").lower() != "false"
    try:
        if _is_finished(script_args, folder, asked=asked):
            say(finished_run(folder), always=True)
            if not script_args.is_dry_run:
                raise FinishedRun(0)
            return
        checkpoint = training_args.resume_from_checkpoint = _checkpoint(folder, str(wanted)) if asked else None
        _check_place(folder, script_args.settings)
        if script_args.overwrite and asked:
            raise RecipeError("--overwrite removes the run that --resume_from_checkpoint continues. Give one of them.")
        _refuse_another_run(folder, script_args, checkpoint=checkpoint, asked=asked)
    except RecipeError as error:
        if not script_args.is_dry_run:
            raise
        say(f"This run would not start: {error}", always=True)


def _is_finished(script_args: RecipeArguments, folder: Path, *, asked: bool) -> bool:
    """Returns True if the output folder holds this run, finished, and the run is to be kept."""
    held, done = read_json(folder / SETTINGS_FILE), read_json(folder / DONE_FILE)
    requests = {script_args.settings["request"], done.get("request")} - {None}  # None: without the launcher
    same = bool(done and held) and not settings_differences(held, script_args.settings)
    return same and not script_args.overwrite and (asked or len(requests) < 2)


def _checkpoint(folder: Path, wanted: str) -> str | None:
    """The checkpoint that is named, or with `true` the latest complete one in the folder; None if it holds none."""
    if wanted.lower() != "true":
        if not Path(wanted).is_dir():
            raise RecipeError(f"There is no checkpoint {wanted}. --resume_from_checkpoint true finds the latest one.")
        if reason := incomplete_reason(wanted):
            raise RecipeError(f"{wanted} is {reason}. {_other_ways(Path(wanted))}")
        return wanted
    if found := latest_checkpoint(folder):
        say(f"Resuming from {found}.")
        return str(found)
    if damaged := [path for path in checkpoints_of(folder) if not was_cut_short(path)]:
        held = "; ".join(f"{path.name} is {incomplete_reason(path)}" for path in damaged[:3])
        raise RecipeError(f"{folder} has no checkpoint that can be resumed from: {held}. {_other_ways(damaged[0])}")
    say(f"There is no checkpoint to go on from in {folder}: starting at step 0.")
    return None


def _other_ways(checkpoint: Path) -> str:
    """Advice for a checkpoint that cannot be resumed from."""
    if incomplete_reason(checkpoint) != WEIGHTS_ALONE:
        way = "name a complete one with --resume_from_checkpoint FOLDER"
    elif (checkpoint / "adapter_config.json").exists():
        merged = f"{checkpoint.parent}_{checkpoint.name}"
        merge = f"dpo-recipes merge {checkpoint} --output_dir {merged}"
        way = f"make a model of its weights ({merge}) and train on from that with --model_name_or_path {merged}"
    else:
        way = f"train on from its weights with --model_name_or_path {checkpoint}"
    return f"Nothing was changed. Start again with --overwrite true, or {way}."


def _check_place(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises RecipeError if files cannot be written into the folder, or if it holds a model that the run needs."""
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file. Name a folder with --output_dir.")
    check_writable(next(path for path in (folder, *folder.absolute().parents) if path.exists()))
    for what, key in (("initial model", "model_name_or_path"), ("reward model", "reward_model_name_or_path")):
        if settings.get(key) and folder.resolve() == Path(settings[key]).resolve():
            raise RecipeError(f"{folder} is the {what}, which the run would replace. Choose another --output_dir.")


def _refuse_another_run(folder: Path, script_args: RecipeArguments, *, checkpoint: str | None, asked: bool) -> None:
    """Raises RecipeError if the folder holds a run that this one neither resumes nor may overwrite."""
    held = read_json(folder / SETTINGS_FILE)
    held = held if "pairs_per_update" in held else {}  # another program's settings have that name too
    differences = settings_differences(held, script_args.settings) if held else []
    if held and checkpoint and folder.resolve() in Path(checkpoint).resolve().parents:
        refuse_strangers(folder, changed_only=True)
        if differences:
            say("The resumed run had other settings: " + "; ".join(differences))
        return
    if held and not script_args.overwrite:
        ways_out = "Choose another --output_dir, or replace it with --overwrite true."
        if differences:
            raise RecipeError(f"{folder} holds another run, which differs in {'; '.join(differences)}. {ways_out}")
        if (folder / DONE_FILE).exists():
            raise RecipeError(f"{folder} holds a finished run of other data, code or flags. {ways_out}")
        if checkpoints_of(folder) and not asked:
            raise RecipeError(
                f"{folder} holds this run, unfinished. Continue it with --resume_from_checkpoint true, or start again "
                "with --overwrite true."
            )
    refuse_strangers(folder)


def check_start(settings: Mapping[str, Any], training_args: TrainingArguments) -> None:
    """Raises RecipeError unless the weights of the model to train are whole and fit its configuration.

    Args:
        settings: As in `RecipeArguments.settings`. Without a model's name, or with a model at the Hub, no file is read.
        training_args: A TRL config.
    """
    if name := settings.get("model_name_or_path"):
        is_reward_model = isinstance(training_args, RewardConfig)
        revision = settings.get("model_revision") or "main"
        options: dict[str, Any] = dict(revision=revision, trust_remote_code=training_args.trust_remote_code)
        check_weights(replace(full_model(name, **options), is_reward_model=is_reward_model), **options)


def load_tokenizer(model_args: ModelConfig, training_args: TrainingArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe's initial model, with the chat template of SFTConfig's `chat_template_path`.

    Args:
        model_args: Names the model: a folder or a Hub name.
        training_args: A TRL config.

    Raises:
        RecipeError: If there is no such model, the Hub cannot be reached, or the folder holds an adapter alone or a
            reward model (which RewardConfig accepts).
    """
    name = str(model_args.model_name_or_path)
    options = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    _check_kind(name, is_reward_model=isinstance(training_args, RewardConfig), **options)
    load = AutoTokenizer.from_pretrained
    try:
        tokenizer = load(name, **options)
        if template := getattr(training_args, "chat_template_path", None):  # DPOConfig has none
            file = Path(template)
            tokenizer.chat_template = file.read_text("utf-8") if file.is_file() else load(template).chat_template
    except (OSError, ValueError) as error:
        raise RecipeError(unreachable(name, error)) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one where there is none
        raise RecipeError(f"{NO_TOKENIZER} ({name})")
    return tokenizer


def _check_kind(name: str, *, is_reward_model: bool, **options: Any) -> None:
    """Raises RecipeError unless the name is a full model of the kind that the trainer takes."""
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
        raise RecipeError(f"{name} holds no config.json; a full model is needed. Name its folder.")
    if not folder.exists() and re.match(r"[/~.]|outputs/", name):
        recipe = folder.name.replace("_", "-")
        remedy = f"Train it first: dpo-recipes train {recipe}" if recipe in list_recipes() else "Check the path"
        raise RecipeError(f"There is no model in {name}. {remedy}.")
    try:
        artifact = full_model(name, reward_model=None if is_reward_model else False, **options)
    except RecipeError as error:
        if folder.is_dir():
            raise
        raise RecipeError(unreachable(name, error.__cause__ or error)) from error
    if artifact.is_reward_model and not is_reward_model:
        raise RecipeError(
            f"{name} holds a reward model, whose score head is no language model's. Name the model to train with "
            "--model_name_or_path, and the one that scores with --reward_model_name_or_path."
        )
