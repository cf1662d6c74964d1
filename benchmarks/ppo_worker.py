"""One training by one trainer, for bench_ppo.py; runs under TRL 1.16's Python and under TRL 1.9's.

    python benchmarks/ppo_worker.py '{"trainer": "rloo", "seed": 0, "learning_rate": 1e-3, ...}'

The argument holds the fields of Run. The script saves the LoRA adapter in `folder`, and result.json in the same folder:
seconds of `train()`, the log, versions. It imports only modules of this repository that both Pythons can import.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dpo_recipes import playground
from dpo_recipes.presets import LORA

OURS, OLD, RLOO, GRPO = "ours", "trl-1.9", "rloo", "grpo"
ROLLOUT = 64  # answers between two generations
EPOCHS = 4  # over each rollout
MINIBATCH = 16  # answers an update
GENERATIONS = 4  # answers a prompt, of RLOO and GRPO
BETA = 0.05  # KL coefficient
CLIP = 0.2  # of the probability ratio, and of the value's change in both PPOs
PPO = dict(gamma=1.0, lam=0.95, vf_coef=0.1, cliprange_value=CLIP, missing_eos_penalty=None)
COMMON: dict[str, Any] = dict(
    lr_scheduler_type="constant",
    adam_beta2=0.95,
    weight_decay=0.0,
    gradient_checkpointing=False,
    bf16=False,
    use_cpu=True,
    dataloader_pin_memory=False,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)


@dataclass
class Run:
    """Settings of a training: the trainer, its initial model, its data, and the folder of the result."""

    trainer: str
    start: str  # folder of the model and tokenizer that it starts from
    seed: int
    learning_rate: float
    answers: int  # sampled in training
    folder: str

    @property
    def rollouts(self) -> int:
        """Number of rollouts."""
        return self.answers // ROLLOUT


def train_prompts() -> Dataset:
    """The prompts of the quickstart's training pairs, each once."""
    prompts = playground.load_pairs("playground")["train"]["prompt"]
    return Dataset.from_list([{"prompt": prompt} for prompt in {row[0]["content"]: row for row in prompts}.values()])


def exact_reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """The playground's reward, as a reward function of TRL's online trainers."""
    return [playground.reward(*both) for both in zip(prompts, completions, strict=True)]


class ExactReward(nn.Module):
    """The playground's reward as a reward model of TRL 1.9: a backbone that passes the tokens on, and a score.

    The backbone's hidden states are the token ids, shape (batch, tokens); the score of a row, at every position, is the
    reward of the text after its first <|assistant|>, up to the first end token, so that any position may be read.
    """

    base_model_prefix = "backbone"

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.turn = tokenizer.convert_tokens_to_ids("<|assistant|>")

    def backbone(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        """The token ids as hidden states, with padding tokens restored where TRL 1.9 wrote 0."""
        return SimpleNamespace(hidden_states=[input_ids.where(attention_mask.bool(), self.tokenizer.pad_token_id)])

    def score(self, ids: Tensor) -> Tensor:
        """The reward of each row at each position. Shape (batch, tokens, 1)."""
        rewards = torch.tensor([self.of_row(row) for row in ids.tolist()], device=ids.device)
        return rewards[:, None, None].expand(*ids.shape, 1)

    def of_row(self, row: list[int]) -> float:
        """The reward of a padded prompt with its answer."""
        at = row.index(self.turn)
        prompt, answer = row[:at], row[at + 1 :]
        if self.tokenizer.eos_token_id in answer:
            answer = answer[: answer.index(self.tokenizer.eos_token_id)]
        return playground.reward(*(self.tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, answer)))


def check_reward(model: Any, tokenizer: Any, prompts: Dataset, count: int = 50) -> None:
    """Raises AssertionError unless TRL 1.9 reads the playground's reward of a number of sampled answers."""
    from trl.experimental.utils import get_reward

    prompts = prompts.select(range(count))["prompt"]
    texts = [tokenizer.apply_chat_template(row, tokenize=False, add_generation_prompt=True) for row in prompts]
    queries = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    ids = model.generate(**queries, do_sample=True, top_k=0, max_new_tokens=playground.MAX_NEW_TOKENS)
    width = queries["input_ids"].shape[1]
    answers = tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    expected = torch.tensor(exact_reward(prompts, answers))
    _, got, _ = get_reward(ExactReward(tokenizer), ids, tokenizer.pad_token_id, width)
    if not torch.equal(got, expected) or len(expected.unique()) < 3:
        raise AssertionError(f"TRL 1.9 reads the rewards {got.tolist()}, the playground says {expected.tolist()}")


def load(run: Run) -> tuple[Any, Any]:
    """The initial model in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(run.start, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(run.start)


def lora() -> LoraConfig:
    """The preset LORA as TRL's get_peft_config makes it."""
    return LoraConfig(
        r=LORA["lora_r"],
        lora_alpha=LORA["lora_alpha"],
        lora_dropout=LORA["lora_dropout"],
        target_modules=LORA["lora_target_modules"][0],
        task_type="CAUSAL_LM",
    )


def old_ppo(run: Run) -> Any:
    """TRL 1.9's experimental PPOTrainer.

    A batch without gradient accumulation that is split in mini-batches: with accumulation that trainer updates once an
    epoch, however many mini-batches are asked for.
    """
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    model, tokenizer = load(run)
    tokenizer.padding_side = "left"
    prompts = train_prompts()
    check_reward(model, tokenizer, prompts)
    critic = AutoModelForSequenceClassification.from_pretrained(run.start, num_labels=1, dtype=torch.float32)
    nn.init.zeros_(critic.score.weight)  # as ours
    args = PPOConfig(
        output_dir=run.folder,
        seed=run.seed,
        learning_rate=run.learning_rate,
        total_episodes=run.answers,
        per_device_train_batch_size=ROLLOUT,
        gradient_accumulation_steps=1,
        num_mini_batches=ROLLOUT // MINIBATCH,
        num_ppo_epochs=EPOCHS,
        local_rollout_forward_batch_size=ROLLOUT,
        response_length=playground.MAX_NEW_TOKENS,
        stop_token="eos",
        temperature=1.0,
        kl_coef=BETA,
        cliprange=CLIP,
        whiten_rewards=False,
        num_sample_generations=0,
        **PPO,
        **COMMON,
    )
    tokenised = prompts.map(
        lambda row: {
            "input_ids": tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        },
        remove_columns=prompts.column_names,
    )
    return PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=model,
        ref_model=None,  # the policy without its LoRA adapter
        reward_model=ExactReward(tokenizer),
        value_model=critic,
        train_dataset=tokenised,
        peft_config=lora(),
    )


def online(run: Run, trainer: Any, config: Any, **settings: Any) -> Any:
    """A trainer derived from TRL's GRPOTrainer, or GRPOTrainer itself."""
    model, tokenizer = load(run)
    args = config(
        output_dir=run.folder,
        seed=run.seed,
        learning_rate=run.learning_rate,
        max_steps=run.rollouts * EPOCHS * ROLLOUT // MINIBATCH,
        logging_steps=EPOCHS * ROLLOUT // MINIBATCH,
        per_device_train_batch_size=MINIBATCH,
        gradient_accumulation_steps=1,
        steps_per_generation=ROLLOUT // MINIBATCH,
        num_iterations=EPOCHS,
        max_completion_length=playground.MAX_NEW_TOKENS,
        temperature=1.0,
        beta=BETA,
        epsilon=CLIP,
        **settings,
        **COMMON,
    )
    return trainer(
        model=model,
        reward_funcs=exact_reward,
        args=args,
        train_dataset=train_prompts(),
        processing_class=tokenizer,
        peft_config=lora(),
    )


def build(run: Run) -> Any:
    """The trainer that the run names."""
    if run.trainer == OLD:
        return old_ppo(run)
    if run.trainer == OURS:
        from dpo_recipes.ppo import PPOConfig, PPOTrainer

        return online(run, PPOTrainer, PPOConfig, num_generations=1, **PPO)
    if run.trainer == RLOO:
        return online(run, trl.RLOOTrainer, trl.RLOOConfig, num_generations=GENERATIONS)
    return online(run, trl.GRPOTrainer, trl.GRPOConfig, num_generations=GENERATIONS)


def training_scores(log: list[dict[str, Any]]) -> list[float]:
    """The mean reward of each rollout's answers, in order."""
    names = ("objective/scores", "score", "reward")  # as TRL 1.9, ours, RLOO and GRPO call it
    return [entry[next(filter(entry.__contains__, names))] for entry in log if any(name in entry for name in names)]


def main() -> None:
    """Trains, saves and writes the result."""
    run = Run(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    transformers.set_seed(run.seed)  # TRL 1.9 seeds neither LoRA's weights nor NumPy, which draws its mini-batches
    trainer = build(run)
    trainer.callback_handler.callbacks[:] = [
        callback
        for callback in trainer.callback_handler.callbacks
        if not isinstance(callback, transformers.PrinterCallback)
    ]
    start, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    trainer.save_model(run.folder)
    modules = (trl, transformers, torch, datasets, numpy)
    result = {
        **asdict(run),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "training_scores": training_scores(trainer.state.log_history),
        "log": trainer.state.log_history,
        "versions": {module.__name__: module.__version__ for module in modules},
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
    }
    Path(run.folder, "result.json").write_text(json.dumps(result, indent=1, default=str))


if __name__ == "__main__":
    main()
