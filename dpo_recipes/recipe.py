"""What every recipe shares: its settings, its tokenizer, and how it ends when something is wrong."""

import errno
import hashlib
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import ModelConfig, RewardConfig, ScriptArguments, TrlParser

from dpo_recipes.catalog import read_yaml
from dpo_recipes.errors import RecipeError, UnhealthyRunError
from dpo_recipes.files import check_writable, read_json
from dpo_recipes.manifest import finished_run, refuse_strangers, was_cut_short
from dpo_recipes.models.checkpoints import WEIGHTS_ALONE, checkpoints_of, incomplete_reason, latest_checkpoint
from dpo_recipes.models.open import check_weights, full_model
from dpo_recipes.secrecy import hide, hide_flags, secrets_of, take_secrets
from dpo_recipes.settings import check_settings
from dpo_recipes.terminal import outlive_the_terminal, say, shown
from dpo_recipes.tracking import check_hub, check_trackers

_SECRETS: set[str] = set()
"""Secrets among the flags of this process, which no message may show."""

SETTINGS_FILE = "settings.json"
DONE_FILE = "done.json"

BOOKKEEPING = (
    *("request", "output_dir", "overwrite", "dry_run", "threshold", "health", "resume_from_checkpoint"),
    *("run_name", "report_to", "project", "logging_", "log_", "save_", "eval_", "hub_", "push_to_hub", "disable_tqdm"),
    "dataloader_num_",
)
"""What the names of settings begin with that do not change what is trained: runs that differ in these are the same."""


class FinishedRun(SystemExit):
    """Ends a recipe with status 0: its output folder holds the same run, finished."""


@dataclass
class RecipeArguments(ScriptArguments):
    """The few settings that no TRL dataclass has a field for."""

    pairs_per_update: int = HfArg(
        default=64, help="Pairs per optimizer step over all processes. Gradient accumulation follows from it."
    )
    eval_pairs: int = HfArg(
        default=512, help="Held-out pairs to evaluate on, drawn by seed where the test split has more."
    )
    columns: str | None = HfArg(
        default=None, help="The dataset's names of columns: prompt=instruction,chosen=good,rejected=bad."
    )
    control_tokens_as_text: bool = HfArg(
        default=False, help="Break up control tokens that messages spell, by a zero-width space, so that they are text."
    )
    part: str | None = field(
        default=None,
        metadata={"help": "Of the training prompts: two thirds, or the others.", "choices": ["learn", "judge"]},
    )
    overwrite: bool = HfArg(default=False, help="Replace the run that the output folder holds.")
    dry_run: bool = HfArg(
        default=False, help="Print the settings, the account of the pairs and what the run would need; start nothing."
    )
    threshold: list[str] | None = field(
        default=None, metadata={"help": "Where the preflight warns or refuses: without_eos=0.1 longer=0.8."}
    )
    shared_prefix: str = field(
        default="auto",
        metadata={"help": "Encode a pair's prompt once: auto where tested.", "choices": ["auto", "true", "false"]},
    )
    health: str = field(
        default="warn",
        metadata={"help": "Say what goes wrong, or stop where it is fatal.", "choices": ["warn", "stop", "off"]},
    )
    settings: dict[str, Any] = field(init=False, default_factory=dict)
    """All settings in force, set by `parse_recipe`; not a flag."""


@dataclass
class OnlineArguments(RecipeArguments):
    """Those of a recipe that samples answers and scores them; `pairs_per_update` counts answers there."""

    reward_model_name_or_path: str | None = HfArg(
        default=None, help="Folder or Hub name of the reward model that scores the answers."
    )
    max_prompt_length: int = HfArg(
        default=512, help="Tokens of a prompt. Its oldest turns go first; one that is still longer is dropped."
    )
    max_pair_length: int | None = HfArg(
        default=None, help="Take the prompts of the pairs that DPO keeps at this max_length; for a comparison."
    )


@dataclass
class _LoadedByName:
    """Settings of a profile that a recipe without ModelConfig has no use for: it makes its own model."""

    dtype: str | None = None
    attn_implementation: str | None = None


def argument_classes(namespace: Mapping[str, Any]) -> list[type]:
    """The dataclasses of settings among the names of a recipe file: RecipeArguments, a TRL config, ModelConfig."""
    classes = [value for value in namespace.values() if isinstance(value, type)]
    parts = [part for part in classes if issubclass(part, (TrainingArguments, RecipeArguments, ModelConfig))]
    return [part for part in parts if not any(part in other.__mro__[1:] for other in parts)]  # one of each kind


def parse_recipe(
    recipe: Mapping[str, Any], dataclass_types: Sequence[type], *, to_train: bool = True
) -> tuple[Any, ...]:
    """An instance of each dataclass, from RECIPE < `--config profile.yaml` < flags.

    Sets what follows from other settings: gradient accumulation from `pairs_per_update`, `model_init_kwargs` from
    ModelConfig, and the checkpoint to resume from. Nothing is written and no model is loaded.

    Args:
        recipe: The RECIPE of a recipe file.
        dataclass_types: RecipeArguments, a TRL config and, where a model is loaded by name, ModelConfig.
        to_train: Look at what the output folder holds.

    Raises:
        RecipeError: If a key is unknown anywhere, a value is refused, the pairs per update cannot be met, the output
            folder holds anything but this run, or no checkpoint there can be resumed from.
        FinishedRun: If the output folder holds this run, finished.
    """
    profile: dict[str, Any] = {}
    if "--config" in sys.argv[1:-1]:
        file = Path(sys.argv[sys.argv.index("--config") + 1])
        profile = read_yaml(file) if file.is_file() else {}
    flags = [word.partition("=")[0][2:].replace("-", "_") for word in sys.argv[1:] if word.startswith("--")]
    given = {name: place for place, names in enumerate((recipe, profile, flags)) for name in names}
    for old in given.keys() & {"gradient_checkpointing", "gradient_checkpointing_kwargs"}:
        # Accepted by transformers, and without effect beside a profile's newer name.
        raise RecipeError(f"{old} is called {old.replace('gradient', 'activation')} today. Use that name.")
    loads_by_name = any(issubclass(part, ModelConfig) for part in dataclass_types)
    parts = [*dataclass_types, *([] if loads_by_name else [_LoadedByName])]
    usage = "%(prog)s [--config PROFILE.yaml] [--SETTING VALUE ...]"  # not all of them, above a message of one line
    parser = TrlParser(parts, allow_abbrev=False, usage=usage)
    if unknown := parser.set_defaults_with_config(**recipe):
        raise RecipeError(f"RECIPE has keys that TRL does not know: {' '.join(unknown)}. Correct or remove them.")
    parser.set_defaults_with_config(**profile)
    check_settings(vars(parser.parse_known_args()[0]), dataclass_types, given)
    try:
        parsed: tuple[Any, ...] = parser.parse_args_and_config()[: len(dataclass_types)]
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError) as error:
        hint = " Use the profile cpu without a GPU, turing on a card without bfloat16." if "bf16" in str(error) else ""
        told = hide(f"{error}{hint}", secrets_of(sys.argv))
        raise RecipeError(f"{told} `python {sys.argv[0]} --help` lists the settings.") from error
    _SECRETS.update(secrets_of(sys.argv))
    sys.argv[1:] = hide_flags(sys.argv[1:])  # which trackers keep
    script_args = next(args for args in parsed if isinstance(args, RecipeArguments))
    training_args = next(args for args in parsed if isinstance(args, TrainingArguments))
    model_args = next((args for args in parsed if isinstance(args, ModelConfig)), None)

    take_secrets(training_args)
    check_trackers(training_args)
    if not loads_by_name and (unused := {*flags, *recipe} & {entry.name for entry in fields(_LoadedByName)}):
        raise RecipeError(f"{unused.pop()} has no effect here: this recipe makes its own model. Leave it out.")
    check_hub(training_args)
    _set_accumulation(script_args, training_args)
    if isinstance(script_args, OnlineArguments):
        _set_rollout(script_args, training_args, given)
    if model_args is not None:
        _check_task_type(training_args, model_args)
        _check_attention(model_args.attn_implementation)
        if model_args.model_name_or_path is None:
            raise RecipeError("No model is named. Give a folder or a Hub name with --model_name_or_path.")
        if "dtype" not in flags:
            _load_as_saved(script_args, model_args)
        training_args.model_init_kwargs = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
            **(training_args.model_init_kwargs or {}),
        }
    script_args.settings = _effective_settings(parsed) | {"request": os.environ.get("DPO_RECIPES_REQUEST")}
    if not to_train:
        return parsed
    asked = _is_asked(training_args.resume_from_checkpoint)
    try:
        if _is_finished(script_args, training_args, asked=asked):
            say(finished_run(Path(training_args.output_dir)))
            if not script_args.dry_run:
                raise FinishedRun(0)
            return parsed
        training_args.resume_from_checkpoint = _checkpoint_to_resume(training_args)
        _refuse_another_run(script_args, training_args, asked=asked)
    except RecipeError as error:
        if not script_args.dry_run:
            raise
        say(f"This run would not start: {error}")
    return parsed


def _set_accumulation(script_args: RecipeArguments, training_args: TrainingArguments) -> None:
    if training_args.gradient_accumulation_steps != 1 or training_args.auto_find_batch_size:
        raise RecipeError(
            "gradient_accumulation_steps and auto_find_batch_size follow from pairs_per_update here. Set "
            "--pairs_per_update and --per_device_train_batch_size instead."
        )
    pairs, batch = script_args.pairs_per_update, training_args.per_device_train_batch_size
    steps, rest = divmod(pairs, batch * training_args.world_size)
    if rest or steps < 1:
        raise RecipeError(
            f"pairs_per_update={pairs} is not a multiple of per_device_train_batch_size={batch} times "
            f"{training_args.world_size} process(es). Change one of them."
        )
    training_args.gradient_accumulation_steps = steps


def _set_rollout(script_args: OnlineArguments, training_args: Any, given: Mapping[str, int]) -> None:
    """Answers a rollout, by default those of one update, and the batches that they are learned from in."""
    if "generation_batch_size" not in given:
        training_args.generation_batch_size = script_args.pairs_per_update
    answers, group = training_args.generation_batch_size, training_args.num_generations
    update = script_args.pairs_per_update
    if answers % update or answers % group:
        raise RecipeError(
            f"A rollout of generation_batch_size={answers} answers must be a multiple of pairs_per_update={update}, "
            f"the answers of an update, and of num_generations={group}, those of a prompt. Change one of them."
        )
    at_a_time = training_args.per_device_train_batch_size * training_args.world_size
    training_args.steps_per_generation = answers // at_a_time  # pairs_per_update is a multiple of it


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


def _check_task_type(training_args: TrainingArguments, model_args: ModelConfig) -> None:
    needed = "SEQ_CLS" if isinstance(training_args, RewardConfig) else "CAUSAL_LM"
    if model_args.use_peft and model_args.lora_task_type != needed:
        raise RecipeError(
            f"lora_task_type is {model_args.lora_task_type}, and {type(training_args).__name__} needs {needed}: a "
            "score head is trained and saved with SEQ_CLS alone. Set it in RECIPE or with --lora_task_type."
        )


def _check_attention(name: str | None) -> None:
    known = {"eager", *ALL_ATTENTION_FUNCTIONS.keys()}  # with those that a recipe has registered
    if name and "/" not in name and name.rpartition("|")[2] not in known:
        raise RecipeError(f"There is no attn_implementation {name}. There are: {', '.join(sorted(known))}.")


def _effective_settings(parsed: Sequence[Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for args in parsed:
        values = args.to_dict() if isinstance(args, TrainingArguments) else asdict(args)
        settings |= {entry.name: values[entry.name] for entry in fields(args) if entry.init and entry.name in values}
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def settings_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The settings in which two runs differ, as `name: one -> other`; bookkeeping does not count."""
    return [
        f"{name}: {one.get(name)} -> {other.get(name)}"
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name) and not name.startswith(BOOKKEEPING)
    ]


def settings_hash(settings: Mapping[str, Any]) -> str:
    """A hash of what determines the result; bookkeeping does not count."""
    return hashlib.sha256("\n".join(settings_differences({}, settings)).encode()).hexdigest()[:16]


def _checkpoint_to_resume(training_args: TrainingArguments) -> str | None:
    wanted = training_args.resume_from_checkpoint
    if not _is_asked(wanted):
        return None
    if str(wanted).lower() != "true":
        if not Path(wanted).is_dir():
            raise RecipeError(f"There is no checkpoint {wanted}. --resume_from_checkpoint true finds the latest one.")
        if reason := incomplete_reason(wanted):
            raise RecipeError(f"{wanted} is {reason}. {_other_ways(Path(wanted))}")
        return str(wanted)
    folder = training_args.output_dir
    if found := latest_checkpoint(folder):
        say(f"Resuming from {found}.")
        return str(found)
    if damaged := [path for path in checkpoints_of(folder) if not was_cut_short(path)]:
        held = "; ".join(f"{path.name} is {incomplete_reason(path)}" for path in damaged[:3])
        raise RecipeError(f"{folder} has no checkpoint that can be resumed from: {held}. {_other_ways(damaged[0])}")
    say(f"There is no checkpoint to go on from in {folder}: starting at step 0.")
    return None


def _is_asked(resume_from_checkpoint: str | bool | None) -> bool:
    return str(resume_from_checkpoint or "false").lower() != "false"


def _other_ways(checkpoint: Path) -> str:
    merged = f"{checkpoint.parent}_{checkpoint.name}"
    merge = f"make a model of its weights (dpo-recipes merge {checkpoint} --output_dir {merged}) and train on from that"
    way, start = f"train on from its weights with --model_name_or_path {checkpoint}", checkpoint / "adapter_config.json"
    way = f"{merge} with --model_name_or_path {merged}" if start.exists() else way
    if incomplete_reason(checkpoint) != WEIGHTS_ALONE:
        way = "name a complete one with --resume_from_checkpoint FOLDER"
    return f"Nothing was changed. Start again with --overwrite true, or {way}."


def _refuse_another_run(script_args: RecipeArguments, training_args: TrainingArguments, *, asked: bool) -> None:
    folder = Path(training_args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file. Name a folder with --output_dir.")
    check_writable(next(path for path in (folder, *folder.absolute().parents) if path.exists()))
    starts = {"model to start from": "model_name_or_path", "reward model": "reward_model_name_or_path"}
    for what, key in starts.items():
        start = script_args.settings.get(key)
        if start and folder.resolve() == Path(start).resolve():
            raise RecipeError(f"{folder} is the {what}, which the run would replace. Choose another --output_dir.")
    if script_args.overwrite and asked:
        raise RecipeError("--overwrite removes the run that --resume_from_checkpoint goes on with. Give one of them.")
    held = read_json(folder / SETTINGS_FILE)
    held = held if "pairs_per_update" in held else {}  # another program's settings have that name too
    differences = settings_differences(held, script_args.settings) if held else []
    checkpoint = training_args.resume_from_checkpoint
    if held and checkpoint and Path(checkpoint).resolve().parent == folder.resolve():
        refuse_strangers(folder, changed_only=True)
        if differences:
            say("The resumed run had other settings: " + "; ".join(differences))
        return
    ways_out = "Choose another --output_dir, or replace it with --overwrite true."
    if differences and not script_args.overwrite:
        raise RecipeError(f"{folder} holds another run, which differs in {'; '.join(differences)}. {ways_out}")
    if held and (folder / DONE_FILE).exists() and not script_args.overwrite:
        raise RecipeError(f"{folder} holds a finished run of other data, code or flags. {ways_out}")
    if held and checkpoints_of(folder) and not (asked or script_args.overwrite):
        raise RecipeError(
            f"{folder} holds this run, unfinished. Continue it with --resume_from_checkpoint true, or start again "
            "with --overwrite true."
        )
    refuse_strangers(folder)


def _is_finished(script_args: RecipeArguments, training_args: TrainingArguments, *, asked: bool) -> bool:
    """Returns True if the output folder holds this run, finished, and the run is to be kept."""
    folder = Path(training_args.output_dir)
    held, done = read_json(folder / SETTINGS_FILE), read_json(folder / DONE_FILE)
    requests = {script_args.settings["request"], done.get("request")} - {None}  # None: without the launcher
    same = bool(done and held) and not settings_differences(held, script_args.settings)
    return same and not script_args.overwrite and (asked or len(requests) < 2)


def check_start(settings: Mapping[str, Any], training_args: TrainingArguments) -> None:
    """Raises RecipeError unless the weights of the model to train are whole and fit its configuration.

    Args:
        settings: Those of `RecipeArguments.settings`. Without a model's name, and at the Hub, nothing is looked at.
        training_args: A TRL config.
    """
    if name := settings.get("model_name_or_path"):
        is_reward_model = isinstance(training_args, RewardConfig)
        options: dict[str, Any] = dict(
            revision=settings.get("model_revision") or "main", trust_remote_code=training_args.trust_remote_code
        )
        check_weights(replace(full_model(name, **options), is_reward_model=is_reward_model), **options)


def load_tokenizer(model_args: ModelConfig, training_args: TrainingArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that a recipe starts from, with SFTConfig's `chat_template_path` put in.

    Args:
        model_args: Names the model: a folder or a Hub name.
        training_args: A TRL config.

    Raises:
        RecipeError: If there is no such model, the Hub cannot be reached, or the folder holds an adapter alone or a
            reward model (which RewardConfig may go on with).
    """
    name = str(model_args.model_name_or_path)
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
        raise RecipeError(f"{name} holds no config.json; a full model is needed. Name its folder.")
    if not folder.exists() and (folder.is_absolute() or folder.parts[0] in (".", "..", "outputs")):
        raise RecipeError(
            f"There is no model in {name}. If a recipe makes it, train that one first: make train "
            f"RECIPE={folder.name.replace('_', '-')}."
        )
    options: dict[str, Any] = dict(
        revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
    )
    wanted = None if isinstance(training_args, RewardConfig) else False
    try:
        artifact = full_model(name, reward_model=wanted, **options)
    except RecipeError as error:
        if folder.is_dir():
            raise
        raise RecipeError(_unreachable(name, error.__cause__ or error)) from error
    if artifact.is_reward_model and wanted is False:
        raise RecipeError(
            f"{name} holds a reward model, whose score head is no language model's. Name the model to train with "
            "--model_name_or_path, and the one that scores with --reward_model_name_or_path."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        chat_template_path = getattr(training_args, "chat_template_path", None)  # DPOConfig has none
        if chat_template_path is not None:
            source = Path(chat_template_path)
            tokenizer.chat_template = (
                source.read_text(encoding="utf-8")
                if source.is_file()
                else AutoTokenizer.from_pretrained(chat_template_path).chat_template
            )
    except (OSError, ValueError) as error:
        raise RecipeError(_unreachable(name, error)) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one where there is none
        raise RecipeError(f"{_NO_TOKENIZER} ({name})")
    return tokenizer


def _unreachable(name: str, error: BaseException) -> str:
    if blamed := _blame(str(error)):
        return blamed
    said = str(error).splitlines()[0]
    if Path(name).is_dir():
        return f"Cannot load {name}: {said} Its files are damaged or of another library: save the model again."
    return (
        f"Cannot load {name}: {said} Without the Hub, give a local folder with --model_name_or_path, or run the "
        "quickstart, which needs no network: make train."
    )


def run(main: Callable[[], object]) -> None:
    """Run a recipe's `main` and end with the exit status that a script can rely on.

    0 done; 1 the work failed; 2 the call or the data was wrong and nothing was started; 130 or 143 interrupted.
    """
    # trl 1.16 and peft 0.21 read the old names of what transformers 5.23 calls activation checkpointing.
    warnings.filterwarnings("ignore", r"`(is_gradient_checkpointing|gradient_checkpointing_\w+)` is", FutureWarning)
    outlive_the_terminal()
    secrets = secrets_of(sys.argv)
    try:
        main()
    except RecipeError as error:
        _leave(2, hide(str(error), secrets))
    except UnhealthyRunError as error:
        _leave(1, str(error))
    except KeyboardInterrupt:
        _leave(130, "Interrupted outside of training. What was saved before is kept.")
    except Exception as error:
        text = str(error)
        if is_disk_full(error):
            _leave(1, f"A disk is full. {_about_the_disk(error)}")
        if blamed := _blame(text):
            _leave(2, blamed)
        if isinstance(error, OSError) and "huggingface.co" in text:
            _leave(2, _unreachable("the model or dataset", error))
        if type(error).__name__ == "OutOfMemoryError":
            _leave(
                1,
                f"Out of memory: {text.splitlines()[0]} Halve --per_device_train_batch_size (the pairs per update stay "
                "the same), lower --max_length, or use a 4-bit recipe.",
            )
        raise


_NO_TOKENIZER = (
    "There is no tokenizer beside the model. Save it into the model's folder: "
    "AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)."
)
_BLAME = {
    r"Couldn't instantiate the backend tokenizer": _NO_TOKENIZER,
    r"trust_remote_code=True": "The model has code of its own, which runs only if you say so: read it, then give "
    "--trust_remote_code true.",
    r"api/repos/create|api/models/.*/(preupload|commit)": "The Hub refused push_to_hub. Log in with `hf auth login`, "
    "name a repository of yours with --hub_model_id, or leave --push_to_hub out.",
    r"Target modules .* not found|No modules were targeted": "lora_target_modules names no module of this model. Take "
    "all-linear; a single name is a regular expression of the whole path: '.*q_proj'.",
}
"""Meaning of errors of the libraries, by a part of their text."""


def _blame(text: str) -> str | None:
    """Meaning of a library's error for the user; None if it is not known."""
    return next((f"{meant} ({text.splitlines()[0]})" for sign, meant in _BLAME.items() if re.search(sign, text)), None)


def _about_the_disk(error: Exception) -> str:
    """Advice for a full disk, by whether the caches or the run's folder fill it."""
    frames = traceback.extract_tb(error.__traceback__)
    if any(re.search(r"/(datasets|huggingface_hub)/", frame.filename) for frame in frames):
        return (
            "It is the one that holds the cache of datasets and models. Free some space there, or name a folder on "
            "another disk with the variable HF_HOME."
        )
    return (
        "Complete checkpoints are kept: free some space and continue with --resume_from_checkpoint true, or keep fewer "
        "with --save_total_limit."
    )


def is_disk_full(error: Exception) -> bool:
    """Returns True if an error of Python, safetensors or torch says that a disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # safetensors and torch.save raise errors of their own, and the last one names no reason.
    signs = ("No space left on device", "File too large", "PytorchStreamWriter failed writing", "inline_container.cc")
    return any(sign in str(error) for sign in signs)


def _leave(status: int, message: str) -> NoReturn:
    if int(os.environ.get("RANK", "0")) == 0:
        message = hide(message, _SECRETS)
        sys.stderr.write(f"{shown(message)}\n")
    raise SystemExit(status)
