"""Tasks with known optima for a policy over a dozen words: what the tests solve, and the figure of docs/ppo.md.

.venv/bin/python tests/helpers/ppo_tasks.py   # draws docs/ppo_tasks.png anew; some minutes
"""

import statistics
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_recipes.ppo import PPOConfig, PPOTrainer

FIGURE = Path(__file__).parents[2] / "docs" / "ppo_tasks.png"
PAD, EOS = 0, 1
PROMPTS = ["w", "x", "y", "z"]
WORDS = ["<pad>", "<eos>", *"abcdefgh", *PROMPTS]
ANSWERS_ONLY = {"suppress_tokens": [PAD, *range(10, len(WORDS))]}
"""Neither padding nor the prompts' words can be sampled, as no trained model would."""
LUCK = {"w": -6.0, "x": -2.0, "y": 2.0, "z": 6.0}

BANDIT = dict(max_completion_length=1, per_device_train_batch_size=32, generation_batch_size=64, max_steps=160)
BANDIT |= dict(learning_rate=5e-3, lr_scheduler_type="linear")
TWO_STEPS = BANDIT | dict(max_completion_length=2, max_steps=320, vf_coef=0.5, cliprange_value=100.0, lam=1.0)
TWO_STEPS |= dict(entropy_coef=0.06)
# Without a warm-up the luck of the first rollouts makes the policy certain before the critic knows it.
WITH_CRITIC, WITHOUT = dict(critic_warmup_steps=40), dict(vf_coef=0.0)


def bandit(prompts, completion_ids, **_):
    """1 for the one token that the prompt asks for."""
    return [float(ids[0] == 2 + PROMPTS.index(prompt)) for prompt, ids in zip(prompts, completion_ids, strict=True)]


def two_steps(prompts, completion_ids, **_):
    """1 for each of two tokens that the prompt asks for, and the prompt's luck; all of it at the end."""
    rewards = []
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        place = PROMPTS.index(prompt)
        rewards.append(LUCK[prompt] + (ids[0] == 2 + place) + (ids[1:] == [9 - place]))
    return rewards


def count_as(completion_ids, **_):
    """The share of a's among the tokens of each answer."""
    return [ids.count(2) / len(ids) for ids in completion_ids]


def tiny_config(**changes):
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    tokens = dict(vocab_size=len(WORDS), pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None)
    return LlamaConfig(**sizes | tokens | dict(max_position_embeddings=16) | changes)


def save_start(folder):
    """A random policy and its tokenizer."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    return folder


def build_trainer(start, output_dir, reward, *, model=None, prompts=PROMPTS * 16, settings, **arguments):
    """A trainer of the policy; `settings` go to PPOConfig, `arguments` to the trainer."""
    small = dict(per_device_train_batch_size=16, generation_batch_size=32, num_iterations=2, max_steps=4)
    machine = dict(use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", disable_tqdm=True)
    task = dict(max_completion_length=2, learning_rate=3e-3, beta=0.0, logging_steps=1, save_strategy="no")
    task |= dict(lr_scheduler_type="constant", output_dir=str(output_dir), generation_kwargs=ANSWERS_ONLY)
    return PPOTrainer(
        str(start) if model is None else model,
        reward,
        PPOConfig(**small | machine | task | settings),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(start),
        **arguments,
    )


def logged(trainer, name):
    """A metric of every rollout or update that it was logged for."""
    return [entry[name] for entry in trainer.state.log_history if entry.get(name) is not None]


def draw():
    """Scores and explained variance by rollout, three seeds each: a thin line for a seed, a thick one for the mean."""
    curves = {"Bandit, one token: score": [("PPO", bandit, BANDIT, "score")]}
    curves["Two tokens and luck: score"] = [
        ("with the critic", two_steps, TWO_STEPS | WITH_CRITIC, "score"),
        ("critic switched off", two_steps, TWO_STEPS | WITHOUT, "score"),
    ]
    curves["Two tokens and luck: explained variance"] = [
        ("with the critic", two_steps, TWO_STEPS | WITH_CRITIC, "value/explained_variance")
    ]
    trained = {}
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    with tempfile.TemporaryDirectory() as folder:
        start = save_start(Path(folder) / "start")
        for index, (title, lines) in enumerate(curves.items(), start=1):
            axes = figure.add_subplot(1, 3, index)
            for color, (label, reward, settings, name) in zip(("tab:blue", "tab:orange"), lines, strict=False):
                key = (reward.__name__, str(settings))
                if key not in trained:
                    trained[key] = [
                        build_trainer(start, f"{folder}/run", reward, settings=settings | {"seed": seed})
                        for seed in range(3)
                    ]
                    for trainer in trained[key]:
                        trainer.train()
                seeds = [logged(trainer, name) for trainer in trained[key]]
                for values in seeds:
                    axes.plot(values, color=color, alpha=0.25, linewidth=0.8)
                axes.plot([*map(statistics.fmean, zip(*seeds, strict=True))], color=color, label=label)
                sys.stdout.write(f"{title}, {label}: last 20 {[round(sum(v[-20:]) / 20, 3) for v in seeds]}\n")
            best = {"Bandit, one token: score": 1, "Two tokens and luck: score": 2}.get(title)
            if best:
                axes.axhline(best, color="gray", linestyle=":", label="optimum")
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("rollout of 64 answers", fontsize=9)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    figure.savefig(FIGURE, dpi=110)


if __name__ == "__main__":
    draw()
