"""A finished run, used: its LoRA adapter merged, its answers beside those of the model that it started from."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, TextStreamer

from dpo_recipes.dataset_adapters import DROP_REASONS, Drop
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import check_writable, read_json, write_json
from dpo_recipes.manifest import NEW_FILES, declare, settle
from dpo_recipes.models.checkpoints import MERGING, check_saved, merge_adapter, replace_adapter
from dpo_recipes.models.open import changes_layers, identify, open_model, read_adapter, run_settings
from dpo_recipes.models.rewards import check_reloads
from dpo_recipes.terminal import say, shown

MERGE_FILE = "merge.json"
PROBE = "What the model says of this must stay the same."


def merge(run: str, output_dir: str | None = None, *, base: str | None = None, trust_remote_code: bool = False) -> Path:
    """The folder of a full model, its base with the run's adapter merged into it, written whole.

    A 4-bit base is left alone: what is merged into is the model that it was made from. The dtype is the base's own. A
    reward model's adapter is merged with its score head.

    Args:
        run: The folder of an adapter.
        output_dir: By default the run's with `_merged` behind it. An earlier merge of the same run is replaced. The
            run's own folder: the full model takes the adapter's place there.
        base: By default the one that the LoRA adapter was trained on.
        trust_remote_code: As in `open_model`.

    Raises:
        RecipeError: If the run holds no adapter that can be merged, or `output_dir` holds anything else.
        RuntimeError: If the merged model answers otherwise.
    """
    target = Path(output_dir or f"{os.path.abspath(run)}_merged")
    if not (adapter := read_adapter(run)):
        there = (Path(run) / "config.json").exists()
        what = "a full model already: use it as it is" if there else "no adapter_config.json: name the folder of a run"
        raise RecipeError(f"A LoRA adapter is needed, and {run} holds {what}.")
    cannot = RecipeError(
        f"{run} is an adapter of the kind {adapter['peft_type']}, which cannot be merged into its base. Load it with "
        "PEFT as it is, or train a LoRA adapter."
    )
    if not changes_layers(adapter):
        raise cannot
    trust: dict[str, Any] = dict(trust_remote_code=trust_remote_code)
    origin = {"lora_adapter": str(Path(run).resolve()), "base_model": identify(run, base=base, **trust).start}
    in_place = target.resolve() == Path(run).resolve() and (target / "settings.json").exists()  # a run of ours
    held = in_place or read_json(target / MERGE_FILE).get("lora_adapter") == origin["lora_adapter"]
    if target.exists() and not (held or (target.is_dir() and not any(target.iterdir()))):
        raise RecipeError(f"{target} holds something else. Name another folder with --output_dir, or remove it.")
    check_writable(target.parent)
    say(f"Merging {run} into {origin['base_model']}.")
    model, tokenizer = open_model(run, base=base, as_trained=False, reward_model=None, **trust)
    probe = tokenizer(PROBE, return_tensors="pt", return_token_type_ids=False).to(model.device)
    is_reward_model = adapter.get("task_type") == "SEQ_CLS"
    try:
        merged = merge_adapter(model, probe)
    except NotImplementedError as error:
        raise cannot from error
    if in_place:
        declare(target, NEW_FILES, MERGING)
        replace_adapter(target, merged)
        settle(target, NEW_FILES, MERGING)
        return _merged(target, merged)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        written = Path(temporary) / target.name
        merged.save_pretrained(written)
        check_saved(written, merged.state_dict())
        tokenizer.save_pretrained(written)
        if is_reward_model:
            check_reloads(str(written), merged, probe)
        write_json(written / MERGE_FILE, origin)
        if target.exists():
            shutil.rmtree(target)
        os.replace(written, target)
    return _merged(target, merged)


def _merged(target: Path, model: PreTrainedModel) -> Path:
    say(f"Model         {target} ({str(model.dtype).removeprefix('torch.')}; it answers a probe as before)")
    return target


def find_start(run: str) -> str:
    """The model that a run was trained from, by what its folder says.

    Raises:
        RecipeError: If it says nothing.
    """
    start = read_adapter(run).get("base_model_name_or_path") or run_settings(run).get("model_name_or_path")
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
    from dpo_recipes.models.generation import check_prompt, sample_tokens

    start = base or find_start(run)
    trust: dict[str, Any] = dict(trust_remote_code=trust_remote_code)
    tuned, tokenizer = open_model(run, base=base if read_adapter(run) else None, **trust)
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
