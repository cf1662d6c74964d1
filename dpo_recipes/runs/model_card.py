"""What a run leaves on record: what it ran on, from what, at what cost, and the model card that says so."""

import hashlib
import json
import platform
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer

from dpo_recipes.files import read_json
from dpo_recipes.pages.markdown import code, fence, inline, one_line, yaml_text
from dpo_recipes.trl_patches import first_update

LIBRARIES = ("dpo-recipes", "trl", "transformers", "datasets", "peft", "accelerate", "bitsandbytes", "torch")
SHOWN_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "pairs_per_update",
    "beta", "loss_type", "loss_weights", "max_length", "center_rewards_coefficient", "reward_model_name_or_path",
    "max_prompt_length", "max_completion_length", "generation_batch_size", "num_generations", "num_iterations",
    "temperature", "gamma", "lam", "vf_coef", "adam_beta2", "weight_decay", "use_peft", "lora_r", "lora_alpha",
    "load_in_4bit", "dtype", "bf16", "seed",
)  # fmt: skip


def peak_memory() -> int:
    """The largest resident memory that this process has had, in bytes.

    On Linux `getrusage` keeps the peak of the process that started this one, which /proc does not.
    """
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cost(trainer: Trainer) -> dict[str, Any]:
    """Updates, seconds and peak memory of a finished run."""
    spent: dict[str, Any] = {
        "updates": trainer.state.global_step,
        "resumed_from_update": first_update(trainer),  # seconds, and tokens of DPO and its like, are since then
        "train_seconds": next(
            (log["train_runtime"] for log in trainer.state.log_history if "train_runtime" in log), None
        ),
        "tokens": next((log["num_tokens"] for log in reversed(trainer.state.log_history) if "num_tokens" in log), None),
        "peak_memory_mib": round(peak_memory() / 2**20),
    }
    if torch.cuda.is_available():
        spent["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return spent


def hardware(device: torch.device, processes: int = 1) -> str:
    """The machine in words: cards, or processor and threads."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name()}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {processes} process(es) x {torch.get_num_threads()} thread(s)"


def data_hash(dataset: Dataset) -> str:
    """A hash of the pairs themselves, in order; the same whether they came from a cache or not."""
    columns = [name for name in ("prompt", "chosen", "rejected", "completion", "text") if name in dataset.column_names]
    digest = hashlib.sha256()
    for rows in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        digest.update(json.dumps(rows.to_pylist()).encode())
    return digest.hexdigest()[:16]


def weights_hash(config: Any) -> str | None:
    """Hash of the weights in the folder that a model was loaded from; None for a model of the Hub."""
    files = sorted(Path(config.name_or_path).glob("*.safetensors")) if config.name_or_path else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def model_card(folder: Path) -> str:
    """The README.md of a finished run, from its settings.json, metrics.json and done.json."""
    settings, metrics, done = (read_json(folder / f"{name}.json") for name in ("settings", "metrics", "done"))
    base, method, report = settings.get("model_name_or_path"), str(done["method"]), metrics.get("table")
    warnings = dict.fromkeys([*metrics.get("warnings", []), *done["warnings"]])
    is_adapter = (folder / "adapter_config.json").exists()
    header = [
        "---",
        *([] if base is None or Path(base).exists() else [f"base_model: {yaml_text(base)}"]),
        f"library_name: {'peft' if is_adapter else 'transformers'}",
        "tags:\n- trl\n- " + method.lower(),
        "---",
    ]
    versions = ", ".join(f"{name} {done['versions'][name]}" for name in LIBRARIES)
    shown = [name for name in SHOWN_SETTINGS if settings.get(name) not in (None, -1)]
    results = f"{fence(report)}\n\n{one_line(metrics['note'])}" if report else ""
    return "\n".join(
        [
            *header,
            f"# {inline(folder.name)}",
            f"\n{method} of {code(base)} on {code(settings.get('dataset_name'))} ({done['training_rows']:,} training "
            "rows; every row is accounted for in `preflight.json`).",
            *(f"\n**Warning.** {one_line(warning)}" for warning in warnings),
            *(["\n## Results on held-out pairs (95 % intervals)", f"\n{results}"] if results else []),
            "\n![curves](curves.png)",
            "\nAll of it on one page: `report.html`.",
            "\n## Settings\n",
            *(f"- {name}: {inline(_words(settings[name]))}" for name in shown),
            "\nAll of them are in `settings.json`, the installed packages in `environment.txt`.",
            "\n## Made with\n",
            f"- {versions}",
            f"- {done['hardware']}; {done['updates']} updates, {done['train_seconds']} s since update "
            f"{done['resumed_from_update']}, peak memory {done['peak_memory_mib']} MiB",
            "",
        ]
    )


def _words(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value
