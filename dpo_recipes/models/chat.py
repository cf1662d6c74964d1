"""Asks a run's model and its initial model the same questions, side by side."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any

from peft import PeftModel
from transformers import TextStreamer

from dpo_recipes.dataset_adapters import DROP_REASONS, Drop
from dpo_recipes.errors import RecipeError
from dpo_recipes.models.generation import check_prompt, sample_tokens
from dpo_recipes.models.open import find_start, open_model, read_adapter
from dpo_recipes.terminal import say, shown


def try_run(
    run: str,
    prompt: str | None = None,
    *,
    base: str | None = None,
    system: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> None:
    """Streams the answers of the initial and of the tuned model, one after the other, to each prompt.

    Args:
        run: A run's folder, or a full model. The base of an adapter is in memory once.
        prompt: By default each line that is typed or piped in; an empty line that is typed ends the session.
        base: The initial model; by default the one that the run names.
        system: A system message in front of each prompt.
        trust_remote_code: As in `open_model`.
        options: For `sample_tokens`. Ctrl-C ends one answer, not the session.

    Raises:
        RecipeError: If a model cannot be loaded, or the initial model is not known.
    """
    start = base or find_start(run)
    tuned, tokenizer = open_model(run, base=base if read_adapter(run) else None, trust_remote_code=trust_remote_code)
    if isinstance(tuned, PeftModel):
        initial, switched_off = tuned, tuned.disable_adapter
    else:
        initial, _ = open_model(start, as_trained=False, trust_remote_code=trust_remote_code)
        switched_off = nullcontext
    sides = ((f"base: {start}", initial, switched_off), (f"tuned: {run}", tuned, nullcontext))
    for question in _typed() if prompt is None else [prompt]:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        try:
            check_prompt(tuned.config, tokenizer, messages)
        except Drop as reason:
            if prompt is not None:
                raise RecipeError(f"Not asked: {DROP_REASONS[str(reason)]}.") from reason
            say(f"(not asked: {DROP_REASONS[str(reason)]})")
            continue
        for title, model, context in sides:
            say(f"\n--- {title}")
            with context():
                _stream(model, tokenizer, messages, **options)


def _typed() -> Iterator[str]:
    """Yields each line of standard input. On a terminal it asks for each, and an empty line is the last."""
    if sys.stdin.isatty():
        with suppress(EOFError):
            while line := input("\n> ").strip():
                yield line
    else:
        for line in filter(None, map(str.strip, sys.stdin)):
            say(f"\n> {line}")
            yield line


def _stream(model: Any, tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> None:
    # A new streamer each time: after Ctrl-C it still holds what it was about to write.
    streamer = _Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        sample_tokens(model, tokenizer, [messages], streamer=streamer, **options)
    except KeyboardInterrupt:
        say("\n(stopped)")


class _Streamer(TextStreamer):
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints a piece of the answer, its control characters spelt out."""
        super().on_finalized_text(shown(text), stream_end=stream_end)
