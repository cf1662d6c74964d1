"""Finds checkpoints that can be resumed from, and proves that weights were saved."""

import json
import logging
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"  # transformers writes it last
WEIGHTS_ALONE = "saved without its optimizer (--save_only_model true)"


def incomplete_reason(checkpoint: str | Path) -> str | None:
    """Reason why a checkpoint cannot be resumed from ("half-written (...)"); None for a complete one.

    transformers writes `trainer_state.json` last, so a readable one means that the main process wrote all its files.
    Every file of weights, optimizer and random state is opened as well: a full disk or another rank may have left one
    short.
    """
    folder = Path(checkpoint)
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"half-written ({STATE_FILE} is missing)"
    except (OSError, ValueError):
        return f"half-written ({STATE_FILE} is cut short)"
    if not isinstance(state, dict) or f"checkpoint-{state.get('global_step')}" != folder.name:
        return f"half-written ({STATE_FILE} is of another step)"
    if not any(file.name.startswith(("optimizer", "scheduler", "rng_state")) for file in folder.iterdir()):
        return WEIGHTS_ALONE
    sharded = any(folder.glob("pytorch_model_fsdp*")) or any(folder.glob("global_step*"))  # FSDP, DeepSpeed
    needed = ["rng_state*.pth"] if sharded else ["*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth"]
    for pattern in needed:
        if not any(folder.glob(pattern)):
            return f"half-written ({pattern} is missing)"
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as tensors:
                    tensors.keys()
            except (SafetensorError, OSError):
                return f"half-written ({file.name} is cut short)"
        elif file.suffix in {".pt", ".pth"} and not zipfile.is_zipfile(file):  # torch.save writes a zip archive
            return f"half-written ({file.name} is cut short)"
    return None


def checkpoints_of(output_dir: str | Path) -> list[Path]:
    """Checkpoints of a run and of its rounds, complete or not, the latest round's first, the highest-numbered first."""
    found = {}
    for pattern in ("checkpoint-*", "round-*/checkpoint-*"):
        for path in Path(output_dir).glob(pattern):
            if numbers := re.fullmatch(r"(?:round-(\d+)/)?checkpoint-(\d+)", path.relative_to(output_dir).as_posix()):
                found[path] = int(numbers[1] or 0), int(numbers[2])
    return sorted(found, key=lambda path: found[path], reverse=True)


def latest_checkpoint(output_dir: str | Path, *, before: float = math.inf) -> Path | None:
    """Highest-numbered complete checkpoint of a run, or None. Incomplete ones are skipped with a warning.

    Args:
        output_dir: The run's folder.
        before: Only checkpoints of earlier updates count.
    """
    for folder in checkpoints_of(output_dir):
        if reason := incomplete_reason(folder):
            logger.warning(f"{folder} is {reason} and is skipped.")
        elif int(folder.name.rpartition("-")[2]) < before:
            return folder
    return None


def trained_weights(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """Weights that `save_pretrained` writes: the adapter's for a PeftModel, else all of them."""
    state: Mapping[str, Any] = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    return dict(state)


def check_saved(folder: str | Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Raises RuntimeError unless a folder holds the weights that were trained, bit for bit.

    Tied weights that safetensors leaves out do not count as missing.

    Args:
        folder: Folder into which `save_pretrained` wrote safetensors files.
        weights: Name to tensor, as `trained_weights` returns them.
    """
    saved: dict[str, torch.Tensor] = {}
    for file in Path(folder).glob("*model*.safetensors"):  # PPO's critic lies beside them
        saved |= load_file(file)
    kept_storage = {weights[name].data_ptr() for name in saved if name in weights}
    for name, tensor in weights.items():
        if name not in saved and tensor.data_ptr() not in kept_storage:
            raise RuntimeError(f"{folder} lacks {name}: what was saved is not what was trained.")
        if name in saved and not torch.equal(saved[name].to(tensor.dtype), tensor.detach().cpu()):
            raise RuntimeError(f"{name} in {folder} differs from the trained weight: it was not saved as it is.")
