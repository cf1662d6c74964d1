"""What every recipe shares: its settings, its tokenizer, and how it ends when something is wrong."""

import errno
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments
from transformers.hf_argparser import HfArg
from trl import DPOConfig, ModelConfig, RewardConfig, ScriptArguments, TrlParser

from dpo_recipes.catalog import read_yaml
from dpo_recipes.checkpoints import incomplete_reason, latest_checkpoint
from dpo_recipes.errors import RecipeError, UnhealthyRunError
from dpo_recipes.files import read_json
from dpo_recipes.terminal import say
from dpo_recipes.tracking import check_trackers

SETTINGS_FILE = "settings.json"
DONE_FILE = "done.json"

BOOKKEEPING = (
    *("request", "output_dir", "overwrite", "dry_run", "threshold", "health", "resume_from_checkpoint"),
    *("run_name", "report_to", "project", "logging_", "log_", "save_", "eval_", "hub_", "push_to_hub", "disable_tqdm"),
    "dataloader_num_",
)
"""What the names of settings begin with that do not change what is trained: runs that differ in these are the same."""


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


def argument_classes(namespace: Mapping[str, Any]) -> list[type]:
    """The dataclasses of settings among the names of a recipe file: RecipeArguments, a TRL config, ModelConfig."""
    classes = [value for value in namespace.values() if isinstance(value, type)]
    parts = [part for part in classes if issubclass(part, (TrainingArguments, RecipeArguments, ModelConfig))]
    return [part for part in parts if not any(part in other.__mro__[1:] for other in parts)]  # one of each kind


def parse_recipe(recipe: Mapping[str, Any], dataclass_types: Sequence[type]) -> tuple[Any, ...]:
    """An instance of each dataclass, from RECIPE < `--config profile.yaml` < flags.

    Sets what follows from other settings: gradient accumulation from `pairs_per_update`, `model_init_kwargs` from
    ModelConfig, and the checkpoint to resume from. Nothing is written and no model is loaded.

    Args:
        recipe: The RECIPE of a recipe file.
        dataclass_types: RecipeArguments, a TRL config and, where a model is loaded by name, ModelConfig.

    Raises:
        RecipeError: If a key is unknown anywhere, a value is refused, the pairs per update cannot be met, or the
            output folder holds another run.
    """
    given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in sys.argv[1:]} | set(recipe)
    if "--config" in sys.argv[1:-1]:
        profile = Path(sys.argv[sys.argv.index("--config") + 1])
        given |= set(read_yaml(profile)) if profile.is_file() else set()
    for old in given & {"gradient_checkpointing", "gradient_checkpointing_kwargs"}:
        # Accepted by transformers, and without effect beside a profile's newer name.
        raise RecipeError(f"{old} is called {old.replace('gradient', 'activation')} today. Use that name.")
    parser = TrlParser(dataclass_types, allow_abbrev=False)
    if unknown := parser.set_defaults_with_config(**recipe):
        raise RecipeError(f"RECIPE has keys that TRL does not know: {' '.join(unknown)}. Correct or remove them.")
    try:
        parsed: tuple[Any, ...] = parser.parse_args_and_config()
    except (ValueError, TypeError, OSError, ImportError) as error:
        hint = " Use the profile cpu without a GPU, turing on a card without bfloat16." if "bf16" in str(error) else ""
        raise RecipeError(f"{error}{hint} `python {sys.argv[0]} --help` lists the settings.") from error
    script_args = next(args for args in parsed if isinstance(args, RecipeArguments))
    training_args = next(args for args in parsed if isinstance(args, TrainingArguments))
    model_args = next((args for args in parsed if isinstance(args, ModelConfig)), None)

    check_trackers(training_args)
    _refuse_ignored(script_args, training_args, given)
    _set_accumulation(script_args, training_args)
    if isinstance(script_args, OnlineArguments):
        _set_rollout(script_args, training_args, given)
    if model_args is not None:
        _check_task_type(training_args, model_args)
        if model_args.model_name_or_path is None:
            raise RecipeError("No model is named. Give a folder or a Hub name with --model_name_or_path.")
        training_args.model_init_kwargs = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
            **(training_args.model_init_kwargs or {}),
        }
    script_args.settings = _effective_settings(parsed) | {"request": os.environ.get("DPO_RECIPES_REQUEST")}
    asked_to_resume = str(training_args.resume_from_checkpoint or "false").lower() != "false"
    training_args.resume_from_checkpoint = _checkpoint_to_resume(training_args)
    try:
        _refuse_another_run(script_args, training_args, asked_to_resume=asked_to_resume)
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


def _refuse_ignored(script_args: RecipeArguments, training_args: TrainingArguments, given: set[str]) -> None:
    """A flag that is accepted and then ignored would be a bug."""
    ignored = {} if isinstance(training_args, DPOConfig) else {"shared_prefix": "only DPO has two answers to a prompt"}
    if isinstance(script_args, OnlineArguments):
        ignored["steps_per_generation"] = "it follows from generation_batch_size, the answers of a rollout"
        ignored["train_sampling_strategy"] = "TRL draws the prompts of a rollout itself"
    for name in given & set(ignored):
        raise RecipeError(f"{name} has no effect here: {ignored[name]}. Leave it out.")


def _set_rollout(script_args: OnlineArguments, training_args: Any, given: set[str]) -> None:
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


def _check_task_type(training_args: TrainingArguments, model_args: ModelConfig) -> None:
    needed = "SEQ_CLS" if isinstance(training_args, RewardConfig) else "CAUSAL_LM"
    if model_args.use_peft and model_args.lora_task_type != needed:
        raise RecipeError(
            f"lora_task_type is {model_args.lora_task_type}, and {type(training_args).__name__} needs {needed}: a "
            "score head is trained and saved with SEQ_CLS alone. Set it in RECIPE or with --lora_task_type."
        )


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
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() != "true":
        if not Path(wanted).is_dir():
            raise RecipeError(f"There is no checkpoint {wanted}. --resume_from_checkpoint true finds the latest one.")
        if reason := incomplete_reason(wanted):
            raise RecipeError(f"{wanted} is half-written: {reason}. --resume_from_checkpoint true skips such ones.")
        return str(wanted)
    most = training_args.max_steps
    found = latest_checkpoint(training_args.output_dir, before=most if most > 0 else None)
    if found is None:
        say(f"There is no complete checkpoint to go on from in {training_args.output_dir}: starting at step 0.")
        return None
    say(f"Resuming from {found}.")
    return str(found)


def _refuse_another_run(
    script_args: RecipeArguments, training_args: TrainingArguments, *, asked_to_resume: bool
) -> None:
    folder = Path(training_args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file. Name a folder with --output_dir.")
    starts = {"model to start from": "model_name_or_path", "reward model": "reward_model_name_or_path"}
    for what, key in starts.items():
        start = script_args.settings.get(key)
        if start and folder.resolve() == Path(start).resolve():
            raise RecipeError(f"{folder} is the {what}, which the run would replace. Choose another --output_dir.")
    checkpoints = sorted(folder.glob("checkpoint-*"))
    weights = [*folder.glob("*.safetensors")]
    if script_args.overwrite or not (checkpoints or weights or (folder / SETTINGS_FILE).exists()):
        return
    ways_out = "Choose another --output_dir, or replace it with --overwrite true."
    if not (held := read_json(folder / SETTINGS_FILE)):
        raise RecipeError(f"{folder} holds weights of a run that is not known here. {ways_out}")
    differences = settings_differences(held, script_args.settings)
    if training_args.resume_from_checkpoint is not None:
        if differences:
            say("The resumed run had other settings: " + "; ".join(differences))
        return
    if differences:
        raise RecipeError(f"{folder} holds another run, which differs in {'; '.join(differences)}. {ways_out}")
    if checkpoints and not asked_to_resume and not (folder / DONE_FILE).exists():
        raise RecipeError(
            f"{folder} holds this run, unfinished. Continue it with --resume_from_checkpoint true, or start again "
            "with --overwrite true."
        )


def load_tokenizer(model_args: ModelConfig, training_args: TrainingArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that a recipe starts from, with SFTConfig's `chat_template_path` put in.

    Args:
        model_args: Names the model: a folder or a Hub name.
        training_args: A TRL config.

    Raises:
        RecipeError: If there is no such model, the Hub cannot be reached, or the folder holds a LoRA adapter alone or a
            reward model (which RewardConfig may go on with).
    """
    name = str(model_args.model_name_or_path)
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        is_adapter = (folder / "adapter_config.json").exists()
        what = "a LoRA adapter alone" if is_adapter else "no config.json"
        way_out = f"Make one: dpo-recipes merge {name} --output_dir {name}_merged" if is_adapter else "Name its folder"
        raise RecipeError(f"{name} holds {what}; a full model is needed. {way_out}.")
    if not folder.exists() and (folder.is_absolute() or folder.parts[0] in (".", "..", "outputs")):
        raise RecipeError(
            f"There is no model in {name}. If a recipe makes it, train that one first: make train "
            f"RECIPE={folder.name.replace('_', '-')}."
        )
    kinds = read_json(folder / "config.json").get("architectures") or []
    if not isinstance(training_args, RewardConfig) and any(
        kind.endswith("ForSequenceClassification") for kind in kinds
    ):
        raise RecipeError(
            f"{name} holds a reward model, whose score head is no language model's. Name the model to train with "
            "--model_name_or_path, and the one that scores with --reward_model_name_or_path."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
        )
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
    return tokenizer


def _unreachable(name: str, error: Exception) -> str:
    return (
        f"Cannot load {name}: {str(error).splitlines()[0]} Without the Hub, give a local folder with "
        "--model_name_or_path, or run the quickstart, which needs no network: make train."
    )


def run(main: Callable[[], object]) -> None:
    """Run a recipe's `main` and end with the exit status that a script can rely on.

    0 done; 1 the work failed; 2 the call or the data was wrong and nothing was started; 130 or 143 interrupted.
    """
    # trl 1.16 and peft 0.21 read the old names of what transformers 5.23 calls activation checkpointing.
    warnings.filterwarnings("ignore", r"`(is_gradient_checkpointing|gradient_checkpointing_\w+)` is", FutureWarning)
    try:
        main()
    except RecipeError as error:
        _leave(2, str(error))
    except UnhealthyRunError as error:
        _leave(1, str(error))
    except KeyboardInterrupt:
        _leave(130, "Interrupted outside of training. What was saved before is kept.")
    except Exception as error:
        text = str(error)
        if _is_disk_full(error):
            _leave(
                1,
                "A disk is full. Complete checkpoints are kept: free some space and continue with "
                "--resume_from_checkpoint true, or keep fewer with --save_total_limit.",
            )
        if isinstance(error, OSError) and "huggingface.co" in text:
            _leave(2, _unreachable("the model or dataset", error))
        if type(error).__name__ == "OutOfMemoryError":
            _leave(
                1,
                f"Out of memory: {text.splitlines()[0]} Halve --per_device_train_batch_size (the pairs per update stay "
                "the same), lower --max_length, or use a 4-bit recipe.",
            )
        raise


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # safetensors and torch.save raise errors of their own, and the last one names no reason.
    signs = ("No space left on device", "File too large", "PytorchStreamWriter failed writing", "inline_container.cc")
    return any(sign in str(error) for sign in signs)


def _leave(status: int, message: str) -> NoReturn:
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stderr.write(f"{message}\n")
    raise SystemExit(status)
