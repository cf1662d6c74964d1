"""Scores completions with a reward model, and refuses a model that cannot score before anything is generated."""

import sys
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from peft import PeftModel
from scipy.special import expit
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template

from dpo_recipes.errors import RecipeError
from dpo_recipes.models.open import check_weights, evaluating, full_model, open_model, refusing
from dpo_recipes.terminal import say

Text = str | list[dict[str, str]]
"""Plain text, or the messages of a conversation."""


def load_reward_model(
    name: str, *, labels: Container[int] = (1,)
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Loads a reward model, on the accelerator if there is one, and its own tokenizer, which can pad.

    Args:
        name: The folder or Hub name of a full sequence-classification model.
        labels: As `check_reward_model` reads them.

    Raises:
        RecipeError: If it cannot be loaded, or is no reward model.
    """
    check_reward_model(*read_reward_config(name, weights=False), [], labels=labels)
    return open_model(name, reward_model=True)


def read_reward_config(
    name: str, *, revision: str = "main", trust_remote_code: bool = False, weights: bool = True
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Reads the configuration and the tokenizer of a reward model.

    Args:
        name: A folder or Hub name.
        revision: On the Hub.
        trust_remote_code: Let code that comes with the model run.
        weights: Compare the weights in a folder with the configuration; they are not kept.

    Raises:
        RecipeError: If there are none, they do not fit, or the name is that of an adapter.
    """
    options: dict[str, Any] = dict(revision=revision, trust_remote_code=trust_remote_code)
    try:
        artifact = full_model(name, reward_model=True, **options)
        if weights and artifact.is_reward_model:
            check_weights(artifact, **options)
        with refusing(f"the tokenizer of {name}"):
            return artifact.config, AutoTokenizer.from_pretrained(name, **options)
    except RecipeError as error:
        if Path(name).is_dir():
            raise
        raise RecipeError(
            f"{error} Train one (dpo-recipes train hh-rlhf-reward), or name a folder or a Hub name with "
            "--reward_model_name_or_path."
        ) from error


def check_reward_model(
    model: PreTrainedModel | PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    *,
    max_completion_length: int = 1,
    labels: Container[int] = (1,),
) -> None:
    """Raises RecipeError unless the reward model can score answers to the prompts; no answer is needed for that.

    Args:
        model: The reward model or its configuration, which says as much.
        tokenizer: The reward model's own.
        prompts: All that will be answered; of conversations with the same roles one is checked.
        max_completion_length: Tokens of the longest answer.
        labels: Numbers of outputs that are accepted. TRL takes the first output as the score; `score` reads two, too.

    Raises:
        RecipeError: If the model's score head is untrained or has other outputs, the tokenizer has no chat template,
            refuses the conversations, cannot pad, or has more tokens than the model, or a prompt leaves no room.
    """
    config: Any = getattr(model, "config", model)
    name = config.name_or_path or "the model"
    _check_head(name, config, labels)
    _check_tokenizer(name, config, tokenizer)
    if prompts:
        _check_template(name, tokenizer, prompts)
        _check_room(name, config, tokenizer, prompts, max_completion_length)


def _check_head(name: str, config: Any, labels: Container[int]) -> None:
    # A model that was built in memory has no architectures yet.
    others = [kind for kind in config.architectures or [] if not kind.endswith("ForSequenceClassification")]
    if others:
        raise RecipeError(
            f"{name} is a {others[0]}, which has no score head: a random one would be put on. Name a reward model, or "
            "train one: dpo-recipes train hh-rlhf-reward."
        )
    if config.num_labels not in labels:
        raise RecipeError(
            f"{name} has {config.num_labels} outputs, where a reward model has one score. Name another, or turn its "
            "outputs into one number in a reward function."
        )


def _check_tokenizer(name: str, config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise RecipeError(
            f"The tokenizer of the reward model {name} can pad with nothing: it has neither a pad nor an EOS token. "
            "Set pad_token in its tokenizer_config.json."
        )
    largest, rows = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if largest >= rows:
        raise RecipeError(
            f"The tokenizer of the reward model {name} has token ids up to {largest}, but its embedding has {rows} "
            "rows: they do not belong together. Put the tokenizer that it was trained with beside the model."
        )


def _check_template(name: str, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]) -> None:
    chats = {str([turn["role"] for turn in prompt]): prompt for prompt in prompts if not isinstance(prompt, str)}
    if chats and tokenizer.chat_template is None:
        raise RecipeError(
            f"The tokenizer of the reward model {name} has no chat template, but the prompts are conversations. Put "
            "the template that it was trained with into its tokenizer, or name another reward model."
        )
    for prompt in chats.values():
        try:
            as_text(prompt, "An answer.", tokenizer)
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(turn["role"] for turn in prompt)
            raise RecipeError(
                f"The chat template of the reward model {name} refuses conversations of {roles}, assistant: {error}. "
                "Name a reward model whose template takes them."
            ) from error


def _check_room(name: str, config: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], most: int) -> None:
    """Raises RecipeError unless the model has positions for each prompt and `most` tokens of an answer."""
    room = context_length(config)
    texts = [as_text(prompt, "", tokenizer) for prompt in prompts]
    longest = max(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]))
    if longest + most > room:
        raise RecipeError(
            f"The reward model {name} takes {room} tokens, but the longest prompt has {longest} of its tokens and an "
            f"answer up to {most}. Lower --max_prompt_length (in a comparison --max_length) or "
            "--max_completion_length."
        )


def context_length(config: Any) -> int:
    """Number of tokens that a model of this configuration has positions for; sys.maxsize if it names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def as_text(prompt: Text, completion: Text, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of prompt and completion as TRL's online trainers show it to a reward model.

    A conversation goes through the chat template, as in RewardTrainer. Plain text is joined; RewardTrainer adds an EOS
    token to it, the online trainers do not, and neither does this function.
    """
    if isinstance(prompt, str):
        return prompt + str(completion)
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    return str(apply_chat_template({"messages": prompt + answer}, tokenizer)["text"])


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    *,
    batch_size: int = 16,
) -> NDArray[np.float64]:
    """Scores of completions by a reward model, in order. Shape (completions,).

    A classifier with two labels gives the probability of the label POSITIVE, or of the second label if none is named
    so (Rafailov et al. 2023, section 6); its texts get the tokenizer's special tokens. A text that is longer than the
    model's positions is cut to its first token and its last tokens; the number of such texts is printed.

    Args:
        model: A reward model or a classifier with two labels; its mode (train or eval) stays as it was.
        tokenizer: The reward model's own, which can pad.
        prompts: One for each completion.
        completions: Plain text after a conversation is an assistant's turn.
        batch_size: Completions at a time. They are sorted by length, so that little is padded.
    """
    texts = [as_text(*both, tokenizer) for both in zip(prompts, completions, strict=True)]
    two = model.config.num_labels == 2
    columns = {name.upper(): column for column, name in model.config.id2label.items()}
    ids = _fitting(tokenizer(texts, add_special_tokens=two, verbose=False)["input_ids"], model, tokenizer)
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    scores = np.zeros(len(ids))
    with evaluating(model):
        for start in tqdm(range(0, len(order), batch_size), desc="Scoring", leave=False):
            rows = order[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, padding_side="right", return_tensors="pt")
            batch = batch.to(model.device)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
            given = logits.softmax(dim=1)[:, columns.get("POSITIVE", 1)] if two else logits[:, 0]
            scores[rows] = given.cpu().numpy()
    return scores


def model_judge(name: str | Path) -> Callable[[Sequence[Text], Sequence[Text]], NDArray[np.float64]]:
    """Function that scores answers to prompts by a reward model or a classifier with two labels, loaded when called."""
    return lambda prompts, texts: score(*load_reward_model(str(name), labels=(1, 2)), prompts, texts)


def calibration(margins: NDArray[np.float64], *, bins: int = 10) -> dict[str, Any]:
    """Calibration of sigmoid(margin) as the probability that chosen is better (Bradley and Terry 1952).

    The favourite of a pair is the side with the higher score. Its probability is sigmoid(|margin|). The favourite is
    right if it is the chosen side, and half right if the scores are equal.

    Args:
        margins: Score of chosen minus score of rejected. Shape (pairs,).
        bins: Of equal width over the favourite's probability, from 0.5 to 1.

    Returns:
        `log_loss` in nats and `brier` of sigmoid(margin); `expected_calibration_error`, the mean over pairs of the
        distance between the share of right favourites and the mean probability in the pair's bin (Guo et al. 2017,
        eq. 3); `reliability`, a row for each bin with pairs: `low`, `high`, `n`, `said` (mean probability), `right`.
    """
    said, right = expit(np.abs(margins)), np.where(margins == 0, 0.5, margins > 0)
    edges = np.linspace(0.5, 1, bins + 1)
    which = np.clip(np.digitize(said, edges) - 1, 0, bins - 1)
    table = []
    for each in np.unique(which):
        inside = which == each
        row = {"low": edges[each], "high": edges[each + 1], "n": inside.sum()}
        row |= {"said": said[inside].mean(), "right": right[inside].mean()}
        table.append({name: value.item() for name, value in row.items()})
    return {
        "log_loss": float(np.logaddexp(0, -margins).mean()),
        "brier": float(np.square(expit(-margins)).mean()),
        "expected_calibration_error": sum(row["n"] * abs(row["said"] - row["right"]) for row in table) / len(margins),
        "reliability": table,
    }


@torch.no_grad()
def check_reloads(folder: str, model: PreTrainedModel, probe: Mapping[str, torch.Tensor]) -> None:
    """Raises RuntimeError unless the reward model in a folder gives a batch the same scores as the one in memory.

    Args:
        folder: Folder in which `model` was saved.
        model: The reward model in memory; its mode is set to eval.
        probe: `input_ids` and `attention_mask`. Shape (batch, tokens).

    Raises:
        RuntimeError: If a score differs.
    """
    reloaded, _ = load_reward_model(folder, labels=(model.config.num_labels,))
    probe = {name: values.to(model.device) for name, values in probe.items()}  # a merge may have gone to the CPU
    scores = model.eval()(**probe).logits.float()
    again = reloaded.to(model.device)(**probe).logits.float()
    error = (again - scores).abs().max().item()
    if not error <= 1e-3 * max(1.0, scores.abs().max().item()):  # NaN is refused too
        raise RuntimeError(f"The reward model in {folder} scores a batch differently by {error:.1e}: do not use it.")


def _fitting(ids: Sequence[list[int]], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Cuts texts that are longer than model and tokenizer take to their first token and their last tokens."""
    room = min(context_length(model.config), tokenizer.model_max_length)
    if longer := sum(len(row) > room for row in ids):
        say(f"{longer} of {len(ids)} texts have more than the {room} tokens that their judge reads: the oldest go.")
    return [row if len(row) <= room else [row[0], *row[len(row) - room + 1 :]] for row in ids]
