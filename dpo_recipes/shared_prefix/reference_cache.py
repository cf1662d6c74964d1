"""Keeps reference log-probs between runs, under a hash of the tokens and the reference model."""

import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import xxhash
from accelerate.utils import broadcast_object_list, is_peft_model, tqdm
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_recipes.files import write_bytes
from dpo_recipes.trl_patches import fingerprint

logger = logging.getLogger(__name__)

_MOST_FILES = 100  # of 8 bytes a pair; the oldest are removed
# Keys of a model's or a LoRA adapter's configuration that change no log-prob:
_ARBITRARY = {"_name_or_path", "transformers_version", "architectures", "dtype", "use_cache", "base_model_name_or_path"}


def precompute_ref_logps(trainer: DPOTrainer, dataset: Dataset, name: str, batch_size: int) -> Dataset:
    """Pairs with `ref_chosen_logps` and `ref_rejected_logps`, as `DPOTrainer._precompute_ref_logps` returns them.

    The log-probs are read from `cache_folder` if an earlier run left them there; otherwise they are computed and
    written there. Sharded models (FSDP, DeepSpeed), other data collators than TRL's and reference models with dropout
    use TRL's cache.

    Args:
        trainer: With model, reference model and data collator built.
        dataset: Tokenised pairs.
        name: The split, for the progress bar.
        batch_size: Pairs a batch and process.
    """
    accelerator, collator = trainer.accelerator, trainer.data_collator
    ours = isinstance(dataset, Dataset) and isinstance(collator, DataCollatorForPreference)
    if not ours or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or not trainer.args.disable_dropout:
        if isinstance(dataset, Dataset):  # TRL's key lacks these settings: its own filter puts them into the dataset's
            settings = [fingerprint(dataset), repr(collator), trainer.ld_alpha, accelerator.mixed_precision]
            dataset = dataset.select(range(len(dataset)), new_fingerprint=Hasher.hash(settings))
        return DPOTrainer._precompute_ref_logps(trainer, dataset, name, batch_size)
    file = cache_folder() / reference_key(trainer, dataset) if accelerator.is_main_process else None
    found: list[Any] = [file and _read(file)]
    broadcast_object_list(found)  # the main process's
    logps = found[0]
    if logps is None:
        logps = _compute(trainer, dataset, name=name, batch_size=batch_size)
        if file is not None:
            _write(file, logps)
    columns = Dataset.from_dict({"ref_chosen_logps": logps[0], "ref_rejected_logps": logps[1]})
    return concatenate_datasets([dataset, columns], axis=1)


def cache_folder() -> Path:
    """Folder of the log-probs, one file a dataset and reference model; it may be deleted at any time."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "dpo-recipes" / "reference"


def reference_key(trainer: DPOTrainer, dataset: Dataset) -> str:
    """Hash of everything that the log-probs depend on.

    The weights in memory are hashed, so that a model that was changed after loading has a key of its own. A LoRA
    adapter that is trained is not part of the reference model. TRL's "ref" is: the copy of an initial LoRA adapter.
    """
    model = trainer.accelerator.unwrap_model(trainer.ref_model or trainer.model)
    adapters = model.peft_config if trainer.ref_model is None and is_peft_model(model) else {}
    trained = set(adapters) - {"ref"}
    kept = [model.config, *(config for name, config in adapters.items() if name == "ref")]
    configs = [{key: value for key, value in each.to_dict().items() if key not in _ARBITRARY} for each in kept]
    digest = xxhash.xxh3_128(Hasher.hash([configs, trainer.accelerator.mixed_precision, trainer.ld_alpha]).encode())
    for name, tensor in model.state_dict().items():
        parts = name.removeprefix("base_model.model.").split(".")
        if not trained.intersection(parts):
            # peft moves a weight under these names where it puts a LoRA adapter or a copy to train beside it.
            parts = [part for part in parts if part not in ("base_layer", "original_module")]
            digest.update(f"{'.'.join(parts)} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    _hash_tokens(digest, dataset, trainer.data_collator)
    return str(digest.hexdigest())


def _hash_tokens(digest: Any, dataset: Dataset, collator: DataCollatorForPreference) -> None:
    """Hashes the ids that the collator keeps of each sequence, a completion's inverted to tell them from a prompt's."""
    at_end = collator.max_length is not None and collator.truncation_mode == "keep_end"
    kept = slice(-collator.max_length, None) if at_end else slice(collator.max_length)
    columns = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).with_format("numpy")
    for batch in columns.iter(1000):
        for prompt, *sides in zip(*batch.values(), strict=True):
            for side in sides:
                ids = np.concatenate([prompt, ~side])[kept]  # int64
                digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())


def _compute(trainer: DPOTrainer, dataset: Dataset, *, name: str, batch_size: int) -> np.ndarray:
    """Log-probs of chosen and rejected on every process. Shape (2, pairs)."""
    args, what = trainer.args, f"Computing reference log probs for {name} dataset"
    loader = DataLoader(dataset, batch_size, collate_fn=trainer.data_collator, num_workers=args.dataloader_num_workers)
    parts = []
    for batch in tqdm(trainer.accelerator.prepare(loader), desc=what, disable=args.disable_tqdm):
        logps = torch.stack(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch), dim=1)
        parts.append(trainer.accelerator.gather_for_metrics(logps).float().cpu())  # (pairs, 2)
    return torch.cat(parts).T.numpy()


def _read(file: Path) -> np.ndarray | None:
    try:
        data = file.read_bytes()
    except OSError:  # most often there is none
        return None
    if xxhash.xxh3_128_digest(data[16:]) != data[:16]:
        logger.warning("%s is damaged: the reference log-probs are computed again.", file)
        return None
    return np.frombuffer(data[16:], dtype=np.float32).reshape(2, -1)


def _write(file: Path, logps: np.ndarray) -> None:
    try:
        write_bytes(file, xxhash.xxh3_128_digest(logps.tobytes()) + logps.tobytes())
        for old in sorted(file.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-_MOST_FILES]:
            old.unlink(missing_ok=True)
    except OSError as error:  # a full disk, a folder that is read only, another run that deletes the same files
        logger.warning("The next run computes the reference log-probs again: %s", error)
