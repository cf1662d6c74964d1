"""Records a run: its hardware, its cost, hashes of its data and initial weights, and the model card."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer

from dpo_recipes.files import read_json, write_text
from dpo_recipes.machine import peak_memory
from dpo_recipes.pages import page
from dpo_recipes.pages.markdown import code, fence, inline, one_line, yaml_text
from dpo_recipes.runs.metrics import rounds_of
from dpo_recipes.trl_patches import first_update

LIBRARIES = ("dpo-recipes", "trl", "transformers", "datasets", "peft", "accelerate", "bitsandbytes", "torch")
SHOWN_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "pairs_per_update",
    "beta", "loss_type", "loss_weights", "max_length", "center_rewards_coefficient", "reward_model_name_or_path",
    "max_prompt_length", "max_completion_length", "num_rounds", "num_prompts", "reference", "generation_batch_size",
    "num_generations", "num_iterations",
    "temperature", "gamma", "lam", "vf_coef", "adam_beta2", "weight_decay", "use_peft", "lora_r", "lora_alpha",
    "load_in_4bit", "dtype", "bf16", "seed",
)  # fmt: skip
BEGIN, END = "<!-- Evaluation by dpo-recipes: begin -->", "<!-- Evaluation by dpo-recipes: end -->"
"""Lines around the part of a model card that `evaluate` writes and replaces."""


def cost(trainer: Trainer) -> dict[str, Any]:
    """Updates, seconds and peak memory of a finished run."""
    last = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    in_rounds = bool(rounds_of(Path(trainer.args.output_dir)))  # which sum up seconds and tokens themselves
    spent: dict[str, Any] = {
        "updates": trainer.state.global_step,
        # seconds, and tokens of offline trainers, count from here
        "resumed_from_update": 0 if in_rounds else first_update(trainer),
        "train_seconds": last.get("train_runtime"),
        "tokens": last.get("num_tokens"),
        "peak_memory_mib": round(peak_memory() / 2**20),
    }
    if torch.cuda.is_available():
        spent["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return spent


def data_hash(dataset: Dataset) -> str:
    """A hash of the rows in order; the same whether they came from a cache or not."""
    columns = [name for name in ("prompt", "chosen", "rejected", "completion", "text") if name in dataset.column_names]
    digest = hashlib.sha256()
    for rows in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        digest.update(json.dumps(rows.to_pylist()).encode())
    return digest.hexdigest()[:16]


def weights_hash(name: str | None) -> str | None:
    """Hash of the weights in a model's folder; None for a model of the Hub, or for one that was made in memory."""
    files = sorted(Path(name).glob("*.safetensors")) if name else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def write_model_card(folder: Path) -> Path:
    """Writes the README.md of a finished run from its settings.json, metrics.json and done.json; returns its path."""
    return write_text(folder / "README.md", model_card(folder))


def model_card(folder: Path, **published: Any) -> str:
    """The model card of a finished run, from its settings.json, metrics.json, health.json and done.json.

    Args:
        folder: Of the run.
        published: For a card at the Hub: `hub_id`, `files` (their names), and entries that differ from the run's own:
            `base`, `base_is_public`, `is_adapter`, `license`. That card keeps the evaluation that stands in the run's.
    """
    names = ("settings", "metrics", "done", "health")
    held = {name: read_json(folder / f"{name}.json") for name in names}
    base = held["settings"].get("model_name_or_path")
    shown = held | {
        "name": folder.name,
        "base": base,
        "base_is_public": base is not None and not Path(base).exists(),
        "is_adapter": (folder / "adapter_config.json").exists(),
        "warnings": dict.fromkeys([*held["metrics"].get("warnings", []), *held["done"]["warnings"]]),
        "shown_settings": SHOWN_SETTINGS,
    }
    filters = {"code": code, "fence": fence, "inline": inline, "one_line": one_line, "yaml_text": yaml_text}
    return page.fill(page.TEMPLATES / "model_card.md.jinja", shown | published, filters)
