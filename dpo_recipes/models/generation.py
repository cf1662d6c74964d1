"""Lets a language model answer prompts."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from jinja2 import TemplateError
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from trl.trainer.utils import pad

from dpo_recipes.dataset_adapters import Drop
from dpo_recipes.errors import RecipeError
from dpo_recipes.models.open import evaluating
from dpo_recipes.models.rewards import Text, context_length

Sampled = tuple[list[int], list[int]]
"""Token ids of a prompt and of one answer to it."""


def check_prompt(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, prompt: Text) -> None:
    """Raises Drop with the reason unless a model of that configuration can answer the prompt.

    Raises:
        RecipeError: If the prompt is a conversation, and the tokenizer has no chat template.
    """
    if not isinstance(prompt, str):
        require_chat_template(tokenizer)
    try:
        _, [ids] = _encode(tokenizer, [prompt])
    except (TemplateError, TypeError, ValueError) as error:
        raise Drop("template_refuses") from error
    if len(ids) >= context_length(config):
        raise Drop("no_room")


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises RecipeError unless the tokenizer has a chat template."""
    if tokenizer.chat_template is None:
        name = tokenizer.name_or_path
        raise RecipeError(f"The tokenizer of {name} has no chat template, so it takes no conversation. Name another.")


def generate(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], **options: Any
) -> list[dict[str, Any]]:
    """Generates one answer to each prompt, in order; `sample_tokens` takes the options.

    Returns:
        For each prompt `text` (without special tokens; an answer to plain text keeps its white space), `tokens` (their
        number) and `ended` (the model gave an end token).
    """
    sampled = sample_tokens(model, tokenizer, prompts, **options)
    return [read_answer(model, tokenizer, *both) for both in zip(prompts, sampled, strict=True)]


def sample_tokens(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    streamer: TextStreamer | None = None,
) -> list[Sampled]:
    """Token ids of each prompt and of one answer to it, up to its end token, in order.

    Both are empty if the prompt leaves no room for an answer in the model's context.

    Args:
        model: A causal language model; its mode (train or eval) stays as it was.
        tokenizer: Its tokenizer, for conversations with a chat template. Prompts are padded on the left here, whatever
            the tokenizer's own side is.
        prompts: Conversations that end in a user turn, or plain text to go on with.
        max_new_tokens: Tokens after which an answer is cut, if the model's context does not cut it before.
        temperature: 0 is greedy decoding. Sampling is from the whole distribution (no top-k, no top-p).
        seed: Of the sampling; the same seed, prompts and batch size give the same answers.
        batch_size: Prompts at a time. They are sorted by length, so that little is padded; prompts that leave less
            room than `max_new_tokens` only go together with equally long ones.
        streamer: Is given each token of the answer to a single prompt.
    """
    stops, context = stop_tokens(model, tokenizer), context_length(model.config)
    sampling = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature > 0 else {}
    # A model's own default of the repetition penalty may be another one.
    ends = dict(repetition_penalty=1.0, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    config = GenerationConfig(**ends, **sampling)
    texts, ids = _encode(tokenizer, prompts)
    order = sorted((row for row in range(len(ids)) if len(ids[row]) < context), key=lambda row: len(texts[row]))
    batches = _batches(order, [len(row) for row in ids], most=batch_size, room=context - max_new_tokens)
    sampled: list[Sampled] = [([], [])] * len(ids)
    with evaluating(model), torch.random.fork_rng():  # the caller's random state stays as it was
        torch.manual_seed(seed)
        for rows in tqdm(batches, desc="Generating", leave=False, disable=streamer is not None):
            padded, mask = pad_left([ids[row] for row in rows], tokenizer.pad_token_id, model.device)
            width = padded.shape[1]
            config.max_new_tokens = min(max_new_tokens, context - width)
            output = model.generate(input_ids=padded, attention_mask=mask, generation_config=config, streamer=streamer)
            for row, tokens in zip(rows, output.tolist(), strict=True):
                answer = tokens[width:]
                end = next((at for at, token in enumerate(answer, start=1) if token in stops), None)
                sampled[row] = ids[row], answer[:end]
    return sampled


def _encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]) -> tuple[list[str], list[list[int]]]:
    """Texts of prompts and their token ids. Plain text gets special tokens from the tokenizer, not from a template."""
    if is_text := any(isinstance(prompt, str) for prompt in prompts):
        texts = [str(prompt) for prompt in prompts]
    else:
        texts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in prompts]
    return texts, tokenizer(texts, add_special_tokens=is_text, verbose=False)["input_ids"]


def _batches(order: Sequence[int], lengths: Sequence[int], *, most: int, room: int) -> list[list[int]]:
    """Divides rows into batches; a row longer than `room`, which would cut the others' answers, is with its equals."""
    groups = [list(rows) for _, rows in groupby(order, key=lambda row: max(lengths[row], room))]
    return [rows[at : at + most] for rows in groups for at in range(0, len(rows), most)]


def pad_left(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of some sequences, padded on the left, and their mask. Each has shape (sequences, longest)."""
    # Not by the tokenizer: it would keep that it pads, and be saved so.
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = pad([torch.ones_like(row) for row in ids], 0, "left")
    return pad(ids, fill, "left").to(device), mask.to(device)


def read_answer(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: Text, sampled: Sampled
) -> dict[str, Any]:
    """Decodes an answer of `sample_tokens` to a prompt, in the form that `generate` returns."""
    before, tokens = sampled
    kept = tokens[:-1] if tokens and tokens[-1] in stop_tokens(model, tokenizer) else tokens
    if isinstance(prompt, str):  # decoded alone, SentencePiece's first token would lose its space
        whole, beginning = tokenizer.batch_decode([before + kept, before], skip_special_tokens=True)
        text = whole[len(beginning) :]
    else:
        text = tokenizer.decode(kept, skip_special_tokens=True).strip()
    return {"text": text, "tokens": len(kept), "ended": len(kept) < len(tokens)}


def stop_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the EOS tokens of the tokenizer and of the model's generation settings."""
    more = model.generation_config.eos_token_id
    return [tokenizer.eos_token_id, *(more if isinstance(more, list) else [] if more is None else [more])]
