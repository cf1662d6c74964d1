"""Finds out whether a folder or Hub name holds a language model, a reward model or an adapter, and opens it."""

import re
import textwrap
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, load_peft_weights
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import find_adapter_config_file, logging
from trl import ModelConfig, get_quantization_config
from trl.trainer.reward_trainer import suppress_seqcls_warning
from trl.trainer.utils import create_model_from_path

from dpo_recipes.errors import RecipeError
from dpo_recipes.files import read_json

LOADING: tuple[type[Exception], ...] = (
    *(OSError, EOFError, ValueError, RuntimeError, LookupError),
    *(SafetensorError, UnpicklingError, StrictDataclassError),
)
"""Errors that the libraries raise for a missing name, a file cut short, a size that does not fit, or a model's code."""
HEADS = ("classifier", "score")
"""PEFT's names of a sequence classifier's head."""
PEFT = "base_model.model."
"""PEFT's prefix of the names of weights."""
TEXT_MODELS = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
"""Model types that can answer a text."""
MERGE_FILE = "merge.json"
"""In a merged model's folder: the adapter and the base that it was made of, and the files that the merge wrote."""


@dataclass(frozen=True)
class Artifact:
    """Content of a folder or Hub name by its configuration files; no weight has been read."""

    name: str
    adapter: Mapping[str, Any]  # its adapter_config.json; empty for a full model
    base: str  # name of the full model: of the artifact itself, or of the adapter's base
    config: PreTrainedConfig  # of the full model
    is_reward_model: bool  # a sequence classifier, or an adapter with a score head


def read_adapter(name: str | Path) -> dict[str, Any]:
    """Reads the `adapter_config.json` of a folder or Hub name; empty where there is none.

    A `config.json` beside it is that of the base, which some libraries copy there.

    Raises:
        RecipeError: If the file cannot be read.
    """
    try:
        found = find_adapter_config_file(str(name))
    except (OSError, ValueError):  # no folder, and no name that the Hub could have
        return {}
    held = read_json(Path(found)) if found else {}
    if found and "peft_type" not in held:
        raise RecipeError(f"{found} is broken: it names no peft_type. Copy the file of the trained adapter again.")
    return held


def run_settings(name: str | Path) -> dict[str, Any]:
    """Reads the settings that a run was trained with, also for one of its checkpoints; empty where there are none."""
    folder = Path(name)
    return read_json(folder / "settings.json") or read_json(folder.parent / "settings.json")


def find_start(run: str) -> str:
    """Name of the initial model of a run, by the files in the run's folder.

    Raises:
        RecipeError: If no file names it.
    """
    found = read_adapter(run).get("base_model_name_or_path") or run_settings(run).get("model_name_or_path")
    if not (found := found or read_json(Path(run) / MERGE_FILE).get("base_model")):
        there = "does not say what it was trained from. Name that model with --base"
        raise RecipeError(f"{run} {there if Path(run).exists() else 'is not here. Name the folder of a run'}.")
    return str(found)


def changes_layers(adapter: Mapping[str, Any]) -> bool:
    """Returns whether an adapter changes layers, as LoRA does, and not the prompt: only then PEFT can take it off."""
    return issubclass(PEFT_TYPE_TO_TUNER_MAPPING.get(adapter["peft_type"], object), BaseTuner)


def identify(name: str, *, base: str | None = None, noun: str = "", **options: Any) -> Artifact:
    """Finds kind, base and configuration of what a folder or Hub name holds.

    Args:
        name: A full model, or an adapter: a run's folder or a checkpoint.
        base: Of an adapter; by default the model that its `adapter_config.json`, or else its run, names.
        noun: Put before the name in an error: "the reward model ".
        options: Of `from_pretrained`, for the full model; only `revision` and `trust_remote_code` are read.

    Raises:
        RecipeError: If there is no configuration, the base is unknown or an adapter itself, or the model is neither a
            language model nor a reward model.
    """
    full, what, remedy = name, f"{noun}{name}", ""
    if adapter := read_adapter(name):
        remedy = f"Name the base: dpo-recipes merge {name} --base MODEL; try and evaluate take --base, too."
        full = _find_base(name, base or adapter.get("base_model_name_or_path"), remedy)
        what = f"{full}, the base of {name}"
    with refusing(what, remedy):
        read = dict(revision=options.get("revision"), trust_remote_code=options.get("trust_remote_code", False))
        config = AutoConfig.from_pretrained(full, **read)
    return Artifact(name, adapter, full, config, is_reward_model=_is_reward_model(name, adapter, full, config))


def _find_base(name: str, named: str | None, remedy: str) -> str:
    if not (named := named or run_settings(name).get("model_name_or_path")):
        raise RecipeError(f"The adapter_config.json of {name} names no base model. {remedy}")
    if read_adapter(named):
        raise RecipeError(
            f"{named}, the base of {name}, is an adapter itself, and a base is a full model. Merge it first "
            f"(dpo-recipes merge {named} --output_dir DIR), and name DIR with --base."
        )
    return named


def _is_reward_model(name: str, adapter: Mapping[str, Any], full: str, config: PreTrainedConfig) -> bool:
    """Returns True for a reward model, False for a language model, and raises RecipeError for anything else."""
    kinds = config.architectures or []
    scores = any(kind.endswith("ForSequenceClassification") for kind in kinds)
    if adapter.get("peft_type") in ("POLY", "MULTITASK_PROMPT_TUNING"):
        raise RecipeError(f"{name} is an adapter of kind {adapter['peft_type']}, which needs a task with each text.")
    if not (scores or config.model_type in TEXT_MODELS or getattr(config, "auto_map", None)):
        kind = next(iter(kinds), config.model_type)
        raise RecipeError(f"{full} is a {kind}, neither a language model nor a reward model. Name one of those.")
    task = adapter.get("task_type") or ("SEQ_CLS" if scores else "CAUSAL_LM")
    if task not in ("SEQ_CLS", "CAUSAL_LM"):
        raise RecipeError(f"{name} is an adapter for {task}. Only those for CAUSAL_LM and SEQ_CLS can be opened.")
    if scores and task == "CAUSAL_LM":
        raise RecipeError(f"{name} is an adapter of a language model, and {full} is a reward model. Name its base.")
    return bool(task == "SEQ_CLS")


def full_model(name: str, *, reward_model: bool | None = None, **options: Any) -> Artifact:
    """Finds kind and configuration of a full model, where an adapter alone is of no use.

    Args:
        name: A folder or Hub name.
        reward_model: Kind that is wanted, for the remedy; None: either.
        options: Of `identify`.

    Raises:
        RecipeError: If it is an adapter, or nothing that can be opened.
    """
    if not (adapter := read_adapter(name)):
        return identify(name, noun="the reward model " if reward_model else "", **options)
    kind = "LoRA" if adapter["peft_type"] == "LORA" else adapter["peft_type"]
    scores = adapter.get("task_type") == "SEQ_CLS"
    if reward_model not in (None, scores):
        way_out = f"Name {'a reward' if reward_model else 'a language'} model"
    elif changes_layers(adapter):
        way_out = f"Make one: dpo-recipes merge {name} --output_dir {name}_merged"
    else:
        way_out = "This kind cannot be merged: name another model"
    owner = ", that of a reward model" if scores else ""
    raise RecipeError(f"{name} holds a {kind} adapter alone{owner}; a full model is needed. {way_out}.")


@contextmanager
def refusing(what: str, remedy: str = "") -> Iterator[None]:
    """Turns the libraries' errors for a model that cannot be read into RecipeError.

    Args:
        what: Name of what is read.
        remedy: A sentence at the end of the message.
    """
    try:
        yield
    except LOADING as error:
        said = textwrap.shorten(str(error) or type(error).__name__, 300)
        if "trust_remote_code" in str(error):
            said = "it brings code of its own. Read it, and let it run with --trust_remote_code true"
        elif isinstance(error, UnpicklingError):
            said = "its weights are pickled with more than tensors, which could run code. Save them as safetensors"
        elif isinstance(error, (LookupError, JSONDecodeError)):
            fault = "is broken" if isinstance(error, JSONDecodeError) else "lacks an entry"
            said = f"a file of it {fault} ({said}). Copy or download it again"
        elif isinstance(error, SafetensorError):
            said = f"a file of weights is cut short or broken ({said}). Copy or download it again"
        raise RecipeError(f"Cannot load {what}: {said.rstrip('.')}. {remedy}".rstrip()) from error


def check_weights(artifact: Artifact, **options: Any) -> None:
    """Raises RecipeError unless the weights in a local folder are whole and fit their configuration.

    The model is built without memory for its weights: a full one by the class that TRL picks, an adapter on its base.
    A model from the Hub or in 4 bits is not checked, and none is under ZeRO-3 or FSDP, which place weights themselves.

    Args:
        artifact: Of a full model or an adapter.
        options: Of `from_pretrained`.
    """
    config = artifact.config
    sharded = is_deepspeed_zero3_enabled() or is_fsdp_enabled()
    if sharded or not Path(artifact.base).is_dir() or getattr(config, "quantization_config", None):
        return
    if not (artifact.adapter or config.architectures):
        kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "LlamaForCausalLM")
        raise RecipeError(
            f"{artifact.base}/config.json names no architectures, by which TRL chooses the class. Add to it: "
            f'"architectures": ["{kind}"].'
        )
    options["device_map"] = {"": "meta"}
    with ExitStack() as restored:
        if logging.is_progress_bar_enabled():
            logging.disable_progress_bar()  # of weights that are not kept
            restored.callback(logging.enable_progress_bar)
        if artifact.adapter:
            _assemble(artifact, **options)
        else:
            load_full(artifact, AutoModelForSequenceClassification if artifact.is_reward_model else None, **options)


def open_model(
    name: str,
    *,
    base: str | None = None,
    as_trained: bool = True,
    reward_model: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Loads a model in evaluation mode and its tokenizer, which can pad.

    Args:
        name: The folder or Hub name of a full model or of an adapter: a run's or a checkpoint's.
        base: Of the adapter; by default the one that it was trained on.
        as_trained: Give an adapter's base the dtype and the 4 bits that it was trained with, not its own weights.
        reward_model: Accept a reward model, too; by default only a language model is opened.
        trust_remote_code: Let code that comes with the model run. No file decides that.
        options: Of `from_pretrained`, for the full model; by default it goes to the accelerator, if there is one.

    Raises:
        RecipeError: If the model, its base or the adapter cannot be loaded, is a reward model where none is accepted,
            or has weights that do not fit.
    """
    settings = run_settings(name)
    options = {"revision": settings.get("model_revision") or "main", "trust_remote_code": trust_remote_code, **options}
    artifact = identify(name, base=base, **options)
    if artifact.is_reward_model and not reward_model:
        raise RecipeError(f"{name} is a reward model: it scores, and answers nothing. Name a language model.")
    options = {"dtype": "auto", "device_map": {"": torch.accelerator.current_accelerator() or "cpu"}, **options}
    if artifact.adapter and as_trained:
        (chosen,) = HfArgumentParser(ModelConfig).parse_dict(settings, allow_extra_keys=True)
        options |= {"dtype": settings.get("dtype") or "auto", "quantization_config": get_quantization_config(chosen)}
    model, tokenizer = _assemble(artifact, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if artifact.is_reward_model:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # the score is read before the padding
    return model.eval(), tokenizer


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Puts a model into evaluation mode, without gradients, and gives it back its mode (train or eval) at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _assemble(artifact: Artifact, **options: Any) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Loads a model, an adapter on its base, with the tokenizer that it was saved with."""
    name, full = artifact.name, artifact.base
    own = AutoModelForSequenceClassification if artifact.is_reward_model else AutoModelForCausalLM
    shapes = _adapter_shapes(name) if artifact.adapter else {}
    if artifact.adapter and artifact.is_reward_model:
        options["num_labels"] = next((shape[0] for key, shape in shapes.items() if key.endswith("score.weight")), 1)
    model = load_full(artifact, own, **options)
    source = full if artifact.adapter and not (Path(name) / "tokenizer_config.json").exists() else name
    with refusing(f"the tokenizer of {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=options["trust_remote_code"])
    if artifact.adapter:
        _resize(model, shapes, tokenizer)
        model = put_adapter(model, name)
    return model, tokenizer


def load_full(artifact: Artifact, own: Any = None, **options: Any) -> PreTrainedModel:
    """Loads the full model of an artifact, and compares its weights with its configuration by name and shape.

    The head may differ where a reward model is made of a language model.

    Args:
        artifact: Of a full model, or of an adapter, whose base is loaded.
        own: The class; by default the one that TRL picks.
        options: Of `from_pretrained`.

    Raises:
        RecipeError: If a file is missing or broken, or a weight does not fit.
    """
    kinds = artifact.config.architectures or []
    headless = artifact.is_reward_model and not any(kind.endswith("ForSequenceClassification") for kind in kinds)
    what = f"{artifact.base}, the base of {artifact.name}" if artifact.adapter else artifact.base
    model: PreTrainedModel
    with refusing(what), suppress_seqcls_warning() if headless else nullcontext():
        model, found = create_model_from_path(
            artifact.base, own, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    body = f"{model.base_model_prefix}." if headless else ""
    misfits = {
        "lacks": {key for key in found["missing_keys"] if key.startswith(body)},
        "has no place for": {key for key in found["unexpected_keys"] if key.startswith(body)},
        "has in another shape": [f"{key} {[*theirs]}, not {[*ours]}" for key, theirs, ours in found["mismatched_keys"]],
    }
    remedy = "Copy or download weights and configuration of one and the same model again"
    _refuse_misfits(f"The weights of {what} do not fit its config.json", misfits, remedy)
    return model


def put_adapter(model: PreTrainedModel, name: str) -> PeftModel:
    """Puts an adapter on its base and returns both in evaluation mode.

    Raises:
        RecipeError: If the adapter cannot be loaded, or its weights are not those that the model needs.
    """
    adapter, shapes = read_adapter(name), _adapter_shapes(name)
    whole = {*(adapter.get("modules_to_save") or ()), *(HEADS if adapter.get("task_type") == "SEQ_CLS" else ())}
    whole &= {path.rpartition(".")[2] for path, _ in model.named_modules()}
    missing = {part for part in whole if not any(f".{part}." in key for key in shapes)}
    _refuse_misfits(f"{name} was not saved whole", {"lacks": missing}, "Copy it again, or train it again")
    with refusing(f"{name} on {model.name_or_path}"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # refused below
        empty = model.device.type == "meta"
        tuned = PeftModel.from_pretrained(model, name, low_cpu_mem_usage=empty)
        # `from_pretrained` does not return the keys that did not fit; `load_adapter` does.
        found = tuned.load_adapter(name, "default", low_cpu_mem_usage=empty)
    if not tuned.active_peft_config.is_prompt_learning:  # its vectors are saved under a name that the model lacks
        # PEFT saves a resized embedding twice more, under names of its own.
        own = re.compile(r"\.(modules_to_save|original_module)\.")
        unexpected = {key for key in found.unexpected_keys if not own.search(key)}
        misfits = {"lacks": found.missing_keys, "has no place for": unexpected}
        remedy = f"Name its own base: dpo-recipes merge {name} --base MODEL"
        _refuse_misfits(f"{name} was trained on another base than {model.name_or_path}", misfits, remedy)
    return tuned.eval()


def _refuse_misfits(what: str, misfits: Mapping[str, Collection[str]], remedy: str) -> None:
    """Raises RecipeError if there are misfits: names of weights by what is wrong with them ("lacks")."""
    said = []
    for fault, keys in misfits.items():
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        said += [f"it {fault} {', '.join(sorted(keys)[:3])}{more}".replace(PEFT, "")] if keys else []
    if said:
        raise RecipeError(f"{what}: {'; '.join(said)}. {remedy}.")


def _adapter_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter's weights by their names."""
    folder, files = Path(name), ("adapter_model.safetensors", "adapter_model.bin")
    if folder.is_dir() and not any((folder / file).exists() for file in files):
        raise RecipeError(f"Cannot load {name}: it has an adapter_config.json, but no {files[0]}. Copy that, too.")
    with refusing(name):
        return {key: tuple(weight.shape) for key, weight in load_peft_weights(name, device="cpu").items()}


def _resize(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the base as many rows of the embedding as the adapter was trained with."""
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    names = [f".{path}." for path, module in model.named_modules() if any(module is end for end in ends)]
    rows = ends[0].weight.shape[0]
    theirs = {key: shape for key, shape in shapes.items() if any(name in key for name in names)}
    wanted = max(rows, len(tokenizer)) if any("trainable_tokens" in key for key in theirs) else rows
    for key, shape in theirs.items():
        if key.endswith("lora_embedding_A"):
            wanted = shape[1]
        elif key.endswith(".weight") and not key.endswith("lora_A.weight"):
            wanted = shape[0]
    if wanted != rows:
        model.resize_token_embeddings(wanted, mean_resizing=False)
