"""The memory estimate of `inspect` and `--dry_run`, compared with the peak of a training on the CPU.

    python benchmarks/bench_memory.py [--tokens 256] [--batch 2] [--hidden 512] [--layers 8]

Each case trains a random Llama (vocabulary 32,000, float32) for two updates, in a process of its own, on pairs that
fill `--tokens` exactly. The measured number is the largest resident memory minus the memory after the same training of
a much smaller model, which is that of the libraries. Seed 0.
"""

import argparse
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import psutil

CASES: dict[str, dict[str, Any]] = {
    "LoRA": {"use_peft": True},
    "LoRA, activation_checkpointing": {"use_peft": True, "activation_checkpointing": True},
    "all weights": {},
    "all weights, activation_checkpointing": {"activation_checkpointing": True},
}
CHILD = "--case"


class Peak(threading.Thread):
    """The largest resident memory of this process since the thread was started, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0

    def run(self) -> None:
        """Reads the memory every 5 milliseconds."""
        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            time.sleep(0.005)


def save_model(config: Any, folder: str) -> None:
    """A random model in a folder."""
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(config).save_pretrained(folder)


def train(case: dict[str, Any], *, tokens: int, batch: int, hidden: int, layers: int) -> dict[str, float]:
    """Estimate by part, and the measured peak, in bytes."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast, logging
    from trl import DPOConfig, DPOTrainer, ModelConfig, get_peft_config

    from dpo_recipes.preflight.memory import count_weights, memory_parts
    from dpo_recipes.presets import LORA

    logging.set_verbosity_error()
    disable_progress_bars()
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "c": 3}, unk_token="c"))  # each word is a token
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    half = tokens // 2
    row = {"prompt": "a " * half, "chosen": "b " * (tokens - half - 1), "rejected": "c " * (tokens - half - 1)}
    pairs = Dataset.from_list([row] * (4 * batch))
    lora = LORA if case.get("use_peft") else {}

    def run(*, hidden: int, layers: int) -> tuple[Any, Any]:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32_000,
            hidden_size=hidden,
            intermediate_size=8 * hidden // 3,
            num_hidden_layers=layers,
            num_attention_heads=8,
            pad_token_id=0,
            eos_token_id=0,
            bos_token_id=None,
        )
        with tempfile.TemporaryDirectory() as folder:
            args = DPOConfig(
                output_dir=folder,
                max_length=tokens,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=2,
                max_steps=2,
                use_cpu=True,
                bf16=False,
                activation_checkpointing=case.get("activation_checkpointing", False),
                dataloader_pin_memory=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            with multiprocessing.get_context("spawn").Pool(1) as other:  # whose memory does not count
                other.apply(save_model, (config, f"{folder}/model"))
            trainer = DPOTrainer(
                model=f"{folder}/model",
                args=args,
                train_dataset=pairs,
                processing_class=tokenizer,
                peft_config=get_peft_config(ModelConfig(**lora)),
            )
            trainer.train()
        return config, args

    run(hidden=64, layers=1)
    gc.collect()
    before = psutil.Process().memory_info().rss
    peak = Peak()
    peak.start()
    config, args = run(hidden=hidden, layers=layers)
    settings = args.to_dict() | lora
    parts = memory_parts(config, count_weights(config, settings), settings, task="preference")
    return {"estimate": sum(parts.values()), "measured": peak.bytes - before, **parts}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 256), ("batch", 2), ("hidden", 512), ("layers", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(CHILD, choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = {name: getattr(options, name) for name in ("tokens", "batch", "hidden", "layers")}
    if options.case:
        print(json.dumps(train(CASES[options.case], **shape)))
        return
    print(f"{shape}\n\n| | estimate, MB | measured, MB | measured / estimate | parts of the estimate, MB |")
    print("| --- | --- | --- | --- | --- |")
    flags = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    for case in CASES:
        command = [sys.executable, __file__, CHILD, case, *flags]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RuntimeError(done.stderr)
        result = json.loads(done.stdout.splitlines()[-1])
        estimate, measured = result.pop("estimate"), result.pop("measured")
        parts = ", ".join(f"{part} {size / 1e6:.0f}" for part, size in result.items())
        print(f"| {case} | {estimate / 1e6:.0f} | {measured / 1e6:.0f} | {measured / estimate:.2f} | {parts} |")


if __name__ == "__main__":
    main()
