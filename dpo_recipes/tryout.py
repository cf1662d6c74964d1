"""A finished run, used: its LoRA adapter merged, its answers beside those of the model that it started from."""

import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from trl.trainer.reward_trainer import suppress_seqcls_warning

from dpo_recipes.checkpoints import check_saved, merge_adapter
from dpo_recipes.dataset_adapters import DROP_REASONS, Drop
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import read_json, write_json
from dpo_recipes.terminal import say, shown

MERGE_FILE = "merge.json"
PROBE = "What the model says of this must stay the same."


def lora_config(name: str | Path) -> dict[str, Any]:
    """What `adapter_config.json` of a folder says; nothing where the folder holds a full model, or there is none."""
    folder = Path(name)
    return {} if (folder / "config.json").exists() else read_json(folder / "adapter_config.json")


def run_settings(name: str | Path) -> dict[str, Any]:
    """The settings that a run was trained with, also of one of its checkpoints; nothing where they are unknown."""
    folder = Path(name)
    return read_json(folder / "settings.json") or read_json(folder.parent / "settings.json")


def open_model(
    name: str,
    *,
    base: str | None = None,
    as_trained: bool = True,
    reward_model: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A causal language model or a reward model, on the accelerator if there is one, and its tokenizer, which can pad.

    Args:
        name: The folder or Hub name of a full model, or the folder of a LoRA adapter: a run's or a checkpoint's.
        base: Of the LoRA adapter; by default the one that it was trained on.
        as_trained: Whether a LoRA adapter's base gets the dtype and the 4 bits that it was trained with, or its own
            weights.
        reward_model: Whether it is one, with a score head.
        trust_remote_code: Whether code that comes with the model may run. No file decides that, a run's own neither.

    Raises:
        RecipeError: If the model or its base cannot be loaded.
    """
    lora, settings = lora_config(name), run_settings(name)
    start = base or lora["base_model_name_or_path"] if lora else name
    what = f"{start}, the base of {name} (--base names another)" if lora else name
    options: dict[str, Any] = dict(
        dtype="auto",
        device_map={"": torch.accelerator.current_accelerator() or "cpu"},
        revision=settings.get("model_revision") or "main",
        trust_remote_code=trust_remote_code,
    )
    if lora and as_trained:
        options |= {"dtype": settings.get("dtype") or "auto", **_quantization(settings)}
    kinds = read_json(Path(start) / "config.json").get("architectures") or []
    if not reward_model and any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise RecipeError(f"{start} is a reward model: it scores, and answers nothing. Name a language model.")
    loader, quietly = AutoModelForCausalLM, nullcontext
    if reward_model:  # TRL's context leaves out the warning that the base has no score head
        loader, quietly = AutoModelForSequenceClassification, suppress_seqcls_warning
        options["num_labels"] = 1
    try:
        with quietly():
            model = loader.from_pretrained(start, **options)
        if lora:
            what = f"{name} on {start}"
            model = PeftModel.from_pretrained(model, name)
        source = name if not lora or (Path(name) / "tokenizer_config.json").exists() else start
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # a size that does not fit, a file cut short
        if "trust_remote_code" in str(error):
            raise RecipeError(
                f"{what} brings code of its own. Read it, and let it run with --trust_remote_code true."
            ) from error
        raise RecipeError(f"Cannot load {what}: {textwrap.shorten(str(error), 300)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if reward_model:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # the score is read before the padding
    return model.eval(), tokenizer


def _quantization(settings: Mapping[str, Any]) -> dict[str, Any]:
    from trl import ModelConfig, get_quantization_config

    known = {entry.name for entry in fields(ModelConfig) if entry.init}
    chosen = ModelConfig(**{key: value for key, value in settings.items() if key in known})
    return {"quantization_config": get_quantization_config(chosen)}


def merge(run: str, output_dir: str | None = None, *, base: str | None = None, trust_remote_code: bool = False) -> Path:
    """The folder of a full model, its base with the run's LoRA adapter merged into it, written whole.

    A 4-bit base is left alone: what is merged into is the model that it was made from. The dtype is the base's own.

    Args:
        run: The folder of a LoRA adapter.
        output_dir: By default the run's with `_merged` behind it. An earlier merge of the same run is replaced.
        base: By default the one that the LoRA adapter was trained on.
        trust_remote_code: As in `open_model`.

    Raises:
        RecipeError: If the run holds no LoRA adapter, or `output_dir` holds anything else.
        RuntimeError: If the merged model answers otherwise.
    """
    target = Path(output_dir or f"{os.path.abspath(run)}_merged")
    if not (lora := lora_config(run)):
        there = (Path(run) / "config.json").exists()
        what = "a full model already: use it as it is" if there else "no adapter_config.json: name the folder of a run"
        raise RecipeError(f"A LoRA adapter is needed, and {run} holds {what}.")
    origin = {"lora_adapter": str(Path(run).resolve()), "base_model": base or lora["base_model_name_or_path"]}
    held = read_json(target / MERGE_FILE).get("lora_adapter") == origin["lora_adapter"]
    if target.exists() and not (held or (target.is_dir() and not any(target.iterdir()))):
        raise RecipeError(f"{target} holds something else. Name another folder with --output_dir, or remove it.")
    say(f"Merging {run} into {origin['base_model']}.")
    model, tokenizer = open_model(run, base=base, as_trained=False, trust_remote_code=trust_remote_code)
    merged = merge_adapter(model, tokenizer(PROBE, return_tensors="pt", return_token_type_ids=False).to(model.device))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        written = Path(temporary) / target.name
        merged.save_pretrained(written)
        check_saved(written, merged.state_dict())
        tokenizer.save_pretrained(written)
        write_json(written / MERGE_FILE, origin)
        if target.exists():
            shutil.rmtree(target)
        os.replace(written, target)
    say(f"Model         {target} ({str(merged.dtype).removeprefix('torch.')}; it answers a probe as before)")
    return target


def find_start(run: str) -> str:
    """The model that a run was trained from, by what its folder says.

    Raises:
        RecipeError: If it says nothing.
    """
    start = lora_config(run).get("base_model_name_or_path") or run_settings(run).get("model_name_or_path")
    start = start or read_json(Path(run) / MERGE_FILE).get("base_model")
    if start is None:
        found = "does not say what it was trained from. Name that model with --base"
        raise RecipeError(f"{run} {found if Path(run).exists() else 'is not here. Name the folder of a run'}.")
    return str(start)


def try_run(
    run: str,
    prompt: str | None = None,
    *,
    base: str | None = None,
    system: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> None:
    """Streams the answers of the start and of the tuned model, one after the other, to each prompt.

    Args:
        run: A run's folder, or a full model. Of a LoRA adapter the base is in memory once.
        prompt: By default each line that is typed or piped in; an empty one that is typed ends it.
        base: The start; by default the one that the run names.
        system: A system message in front of each prompt.
        trust_remote_code: As in `open_model`.
        options: Those of `sample_tokens`. Ctrl-C ends an answer too, and it alone.

    Raises:
        RecipeError: If a model cannot be loaded, or the start is not known.
    """
    from dpo_recipes.evaluation import check_prompt, sample_tokens

    start = base or find_start(run)
    trust: dict[str, Any] = dict(trust_remote_code=trust_remote_code)
    tuned, tokenizer = open_model(run, base=base if lora_config(run) else None, **trust)
    begun = tuned if isinstance(tuned, PeftModel) else open_model(start, as_trained=False, **trust)[0]
    switch = tuned.disable_adapter if isinstance(tuned, PeftModel) else nullcontext
    for question in _typed() if prompt is None else [prompt]:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        try:
            check_prompt(tuned.config, tokenizer, messages)
        except Drop as reason:
            if prompt is not None:
                raise RecipeError(f"Not asked: {DROP_REASONS[str(reason)]}.") from reason
            say(f"(not asked: {DROP_REASONS[str(reason)]})")
            continue
        for title, model, context in ((f"base: {start}", begun, switch), (f"tuned: {run}", tuned, nullcontext)):
            say(f"\n--- {title}")
            # A new one each time: after Ctrl-C it still holds what it was about to write.
            streamer = _Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            try:
                with context():
                    sample_tokens(model, tokenizer, [messages], streamer=streamer, **options)
            except KeyboardInterrupt:
                say("\n(stopped)")


class _Streamer(TextStreamer):
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of the answer, its control characters spelt out."""
        super().on_finalized_text(shown(text), stream_end=stream_end)


def _typed() -> Iterator[str]:
    """Each line of standard input, asked for where that is a terminal; there an empty one is the last."""
    if sys.stdin.isatty():
        with suppress(EOFError):
            while line := input("\n> ").strip():
                yield line
    else:
        for line in filter(None, map(str.strip, sys.stdin)):
            say(f"\n> {line}")
            yield line
