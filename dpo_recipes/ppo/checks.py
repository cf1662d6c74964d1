"""Checks of an online trainer: before training, and of each rollout's scores."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOTrainer

from dpo_recipes.errors import RecipeError
from dpo_recipes.models.rewards import check_reward_model
from dpo_recipes.trl_patches import tokenize_prompts

logger = logging.getLogger(__name__)


def check_online(trainer: GRPOTrainer) -> None:
    """Raises RecipeError unless the prompts make a rollout, leave room for an answer and can be scored.

    Args:
        trainer: Built, before `trainer.train`. The prompts of a streamed dataset are not checked.

    Raises:
        RecipeError: Before anything is generated.
    """
    sets = [trainer.train_dataset, trainer.eval_dataset]
    sets = [each for one in sets for each in (one.values() if isinstance(one, dict) else [one])]
    prompts = [prompt for each in sets if isinstance(each, Dataset) for prompt in each["prompt"][:]]
    answer, rollout = trainer.max_completion_length, trainer.args.generation_batch_size
    if isinstance(sets[0], Dataset) and len(sets[0]) * trainer.num_generations < rollout:
        raise RecipeError(
            f"{len(sets[0])} prompts with num_generations={trainer.num_generations} make no rollout of "
            f"generation_batch_size={rollout} answers. Give more prompts, or lower generation_batch_size."
        )
    for scorer, tokenizer in zip(trainer.reward_funcs, trainer.reward_processing_classes, strict=True):
        if tokenizer is not None:
            model = trainer.accelerator.unwrap_model(scorer)
            check_reward_model(model, tokenizer, prompts, max_completion_length=answer)
    _check_room(trainer, prompts)


def _check_room(trainer: GRPOTrainer, prompts: Sequence[Any]) -> None:
    """Raises RecipeError if a prompt with the longest answer is beyond the policy's positions."""
    answer = trainer.max_completion_length
    context = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return
    parts = (prompts[start : start + 1000] for start in range(0, len(prompts), 1000))
    lengths = [len(ids) for part in parts for ids in tokenize_prompts(trainer, part)]
    if too_long := [length for length in lengths if length + answer > context]:
        raise RecipeError(
            f"{len(too_long):,} of {len(lengths):,} prompts have more than {context - answer} tokens, up to "
            f"{max(too_long):,}: with max_completion_length={answer} that is beyond the model's {context:,} positions. "
            "Shorten or drop them, or lower max_completion_length."
        )


class RolloutCheck:
    """Refuses scores of a rollout that are not numbers; warns once of scores or answers that cannot teach anything."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer = trainer
        self.said: set[str] = set()

    def __call__(self, scores: torch.Tensor, ended: torch.Tensor) -> None:
        """Check the answers of all processes.

        Args:
            scores: Scores of this process's answers. Shape (answers,).
            ended: True where an answer has its end token. Shape (answers,).

        Raises:
            RecipeError: If a score is None, NaN or infinite.
        """
        scores, ended = map(self.trainer.accelerator.gather, (scores, ended))
        names = ", ".join(self.trainer.reward_func_names)
        if bad := int((~scores.isfinite()).sum()):
            raise RecipeError(
                f"{bad} of {len(scores)} answers got a score that is no number (NaN, None or infinite) from {names}. "
                "Return a number for every answer, or leave their prompts out."
            )
        if len(scores) > 1 and bool((scores == scores[0]).all()):
            self._warn_once(
                f"All {len(scores)} answers of a rollout have the same score, {scores[0].item():g}: nothing to learn "
                f"from. See what {names} makes of them: log_completions=True shows them.",
                about="scores",
            )
        if not ended.any():
            most = self.trainer.max_completion_length
            self._warn_once(
                f"None of a rollout's {len(ended)} answers has ended within {most} tokens. Raise "
                "max_completion_length, or start from a model that was taught to end its answers.",
                about="ends",
            )

    def each_function(self, rewards: torch.Tensor) -> None:
        """Warn of a function that gave no number for any answer, as TRL leaves such a function out of the scores.

        Args:
            rewards: Rewards of all processes' answers, NaN where a function gave None. Shape (answers, functions).
        """
        for name, silent in zip(self.trainer.reward_func_names, rewards.isnan().all(dim=0), strict=True):
            if silent:
                self._warn_once(f"{name} gave no number (NaN or None) for any of {len(rewards)} answers.", about=name)

    def _warn_once(self, message: str, *, about: str) -> None:
        if about not in self.said and self.trainer.model.training and self.trainer.accelerator.is_main_process:
            logger.warning(message)
            self.said.add(about)
