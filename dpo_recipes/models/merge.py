"""Makes a full model of an adapter: adds the adapter to the weights of its base."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from dpo_recipes.errors import RecipeError
from dpo_recipes.files import check_writable, fingerprint, read_json, write_json
from dpo_recipes.manifest import NEW_FILES, declare, settle
from dpo_recipes.models.checkpoints import check_saved
from dpo_recipes.models.open import MERGE_FILE, changes_layers, identify, open_model, read_adapter
from dpo_recipes.models.precision import weights_as
from dpo_recipes.models.rewards import check_reloads
from dpo_recipes.terminal import say

MERGING = ".merged"
"""Folder within a run's, in which the merged model is written before it takes the LoRA adapter's place."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MERGE_TOLERANCE = 1e-4
"""Distance of merged and unmerged outputs in float32 that rounding explains, as a share of the largest output."""
MOST_LOST = 0.1
"""Share of what training changed in the outputs that the weights' rounding to 16 bits may take away."""
PROBE = "What the model says of this must stay the same."


def merge(run: str, output_dir: str | None = None, *, base: str | None = None, trust_remote_code: bool = False) -> Path:
    """Writes a full model, the base with the run's adapter merged into it, and returns its folder.

    The base gives its own weights and dtype, also where the adapter was trained on them in 4 bits. A reward model's
    adapter is merged with its score head.

    Args:
        run: The folder of an adapter.
        output_dir: By default the run's with `_merged` behind it. An earlier merge of the same run is replaced. The
            run's own folder: the full model takes the adapter's place there.
        base: By default the model that the adapter was trained on.
        trust_remote_code: As in `open_model`.

    Raises:
        RecipeError: If the run holds no adapter that can be merged, or `output_dir` holds files that no merge wrote.
        RuntimeError: If the merged model gives other outputs than base and adapter.
    """
    target = Path(output_dir or f"{os.path.abspath(run)}_merged")
    if not (adapter := read_adapter(run)):
        there = (Path(run) / "config.json").exists()
        what = "a full model already: use it as it is" if there else "no adapter_config.json: name the folder of a run"
        raise RecipeError(f"A LoRA adapter is needed, and {run} holds {what}.")
    if not changes_layers(adapter):
        raise _unmergeable(run, adapter)
    named: dict[str, Any] = dict(base=base, trust_remote_code=trust_remote_code)
    origin = {"lora_adapter": str(Path(run).resolve()), "base_model": identify(run, **named).base}
    origin["weights"] = adapter_print(run)
    in_place = target.resolve() == Path(run).resolve() and (target / "settings.json").exists()  # a run of ours
    if not in_place:
        _earlier_files(target, origin)
    check_writable(target.parent)
    say(f"Merging {run} into {origin['base_model']}.")
    model, tokenizer = open_model(run, as_trained=False, reward_model=True, **named)
    try:
        merged = merge_adapter(model, _probe(tokenizer, model))
    except NotImplementedError as error:
        raise _unmergeable(run, adapter) from error
    if in_place:
        replace_adapter(target, merged)
    else:
        _write(target, merged, tokenizer, origin)
    say(
        f"Model         {target} ({str(merged.dtype).removeprefix('torch.')}; its outputs on a probe are as before)",
        always=True,
    )
    return target


def adapter_print(run: str | Path) -> str:
    """Fingerprint of the weights of a run's LoRA adapter, by which a merge of them is known; empty without weights."""
    file = Path(run) / ADAPTER_WEIGHTS
    return fingerprint(file) if file.exists() else ""


def _unmergeable(run: str, adapter: Mapping[str, Any]) -> RecipeError:
    return RecipeError(
        f"{run} is an adapter of the kind {adapter['peft_type']}, which cannot be merged into its base. Load it with "
        "PEFT as it is, or train a LoRA adapter."
    )


def _probe(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> BatchEncoding:
    return tokenizer(PROBE, return_tensors="pt", return_token_type_ids=False).to(model.device)


def _earlier_files(target: Path, origin: Mapping[str, str]) -> list[Path]:
    """Files in a folder, all of them written by an earlier merge of the same adapter; empty if there is no folder.

    Raises:
        RecipeError: If the folder holds anything else, or a file that was changed since.
    """
    there = sorted(target.iterdir()) if target.is_dir() else [target] * target.exists()
    held, own = read_json(target / MERGE_FILE), {}
    if held.get("lora_adapter") == origin["lora_adapter"]:
        own = held.get("files", {}) | {MERGE_FILE: fingerprint(target / MERGE_FILE)}
    if others := [path.name for path in there if not (path.is_file() and fingerprint(path) == own.get(path.name))]:
        raise RecipeError(
            f"{target} holds {', '.join(others[:3])}, and no merge of {origin['lora_adapter']} is known to have "
            "written that as it is now. Name another folder with --output_dir, or move or delete the files yourself."
        )
    return there


def _write(target: Path, merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, origin: dict[str, str]) -> None:
    """Writes a merged model into a folder beside `target`, proves it, and puts it in the place of an earlier merge."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        written = Path(temporary) / target.name
        merged.save_pretrained(written)
        check_saved(written, merged.state_dict())
        tokenizer.save_pretrained(written)
        if type(merged).__name__.endswith("ForSequenceClassification"):
            check_reloads(str(written), merged, _probe(tokenizer, merged))
        # A manifest would say that a run wrote these files, and a run may replace its own.
        files = {file.name: fingerprint(file) for file in sorted(written.iterdir())}
        write_json(written / MERGE_FILE, origin | {"files": files})
        for file in _earlier_files(target, origin):
            file.unlink()
        os.replace(written, target)


@torch.no_grad()
def merge_adapter(model: PeftModel, probe: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """Adds a LoRA adapter into the weights of its base, and proves the result on a probe in float32.

    A 16-bit base has too few digits for a small update: most of it would be lost to rounding. So the merged model gets
    the base's dtype only if that keeps what training changed; otherwise it stays in float32. One line says what
    rounding costs, or that float32 costs twice the memory.

    Args:
        model: The trained PeftModel; it is used up. Its base is not quantised.
        probe: A batch of `input_ids` and `attention_mask`. Shape (batch, tokens).

    Raises:
        RuntimeError: If the merged model's outputs on the probe differ in float32 by more than rounding.
    """
    dtype = model.get_base_model().dtype
    model = _in_float32(model.eval())
    probe = {name: values.to(model.device) for name, values in probe.items()}
    tuned = model(**probe).logits
    with model.disable_adapter():
        change = tuned - model(**probe).logits
    merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    error = ((merged(**probe).logits - tuned).abs().max() / tuned.abs().max().clamp(min=1.0)).item()
    if not error <= MERGE_TOLERANCE:  # NaN is refused too
        raise RuntimeError(f"Merging the LoRA adapter moved the logits by {error:.1e} of their largest: not saved.")
    if dtype == torch.float32:
        return merged
    with weights_as(merged, lambda weight: weight.to(dtype).float()):
        lost = ((merged(**probe).logits - tuned).norm() / change.norm().clamp(min=1e-30)).item()
    kept, size = lost <= MOST_LOST, merged.num_parameters() * 4 / 1e9
    bits = str(dtype).removeprefix("torch.")
    say(
        f"Merged the LoRA adapter in float32 (logits as before to {error:.0e} of the largest). Rounding to {bits} "
        f"takes {lost:.1%} of what training changed in them: "
        + (f"saved in {bits}." if kept else f"saved in float32, {size:.1f} GB instead of {size / 2:.1f}.")
    )
    for weight in merged.parameters() if kept else ():  # not the buffers: rotary frequencies stay in float32
        weight.data = weight.data.to(dtype)
    return merged


def _in_float32(model: PeftModel) -> PeftModel:
    """Converts the model to float32, on the CPU where the accelerator has no room for that."""
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(model.device)
        if 4 * model.num_parameters() > free:
            model = model.to("cpu")
    return model.float()


def replace_adapter(folder: Path, merged: PreTrainedModel) -> None:
    """Puts a full model in the place of the LoRA adapter of a run; at any moment one of the two is there whole.

    Raises:
        RuntimeError: If the files do not hold the model; the adapter is still there.
    """
    temporary = folder / MERGING
    declare(folder, NEW_FILES, MERGING)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        merged.save_pretrained(temporary)
        check_saved(temporary, merged.state_dict())
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):  # it goes last
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for name in (ADAPTER_WEIGHTS, "adapter_config.json"):
        (folder / name).unlink(missing_ok=True)
    settle(folder, NEW_FILES, MERGING)
