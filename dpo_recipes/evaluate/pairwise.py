"""Asks a language model which of two answers is better, in both orders, and keeps every reply."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from dpo_recipes.errors import RecipeError
from dpo_recipes.estimates import wilson
from dpo_recipes.evaluate.endpoint import REPLY_TOKENS, USAGE, Endpoint, NoReplyError, ask, request_body
from dpo_recipes.files import read_jsonl, write_jsonl
from dpo_recipes.models.rewards import Text
from dpo_recipes.terminal import say

Array = NDArray[np.float64]
PATIENCE = 15.0  # seconds without a reply, after which the user is told
CHARACTERS = 4  # of a token, about
QUESTION = Path(__file__).with_name("question.txt").read_text(encoding="utf-8").rstrip()
VERDICTS = {"A": 1.0, "B": 0.0, "C": 0.5}


@dataclass
class Judged:
    """The judge's verdict on two answers to each prompt."""

    won: Array  # by prompt: 1 the second answer is better, 0 the first, 0.5 neither, NaN not known
    scores: tuple[Array, Array] | None = None  # of the first and second answers, if the judge scores them one by one
    facts: dict[str, Any] = field(default_factory=dict)  # how the judging went


def expected_cost(endpoint: Mapping[str, Any], prompts: Sequence[Text], *, max_new_tokens: int) -> str:
    """A sentence with the most that judging the answers to the prompts can take.

    Args:
        endpoint: Fields of `Endpoint`.
        prompts: Each takes two requests, one in each order.
        max_new_tokens: Of an answer.
    """
    price = endpoint.get("price")
    characters = sum(len(QUESTION) + len(_as_text(prompt)) for prompt in prompts)
    fields = {"max_tokens": REPLY_TOKENS} | dict(endpoint.get("options") or {})
    limit = fields.get("max_completion_tokens") or fields["max_tokens"]  # of a reply
    requests = 2 * len(prompts)
    read = 2 * (characters // CHARACTERS + 2 * max_new_tokens * len(prompts))
    if limit is None:
        return f"At most {requests:,} requests, about {read:,} tokens to read; replies have no limit, nor has the cost."
    written = requests * limit * fields.get("n", 1)
    said = f"At most {requests:,} requests, about {read:,} tokens to read and {written:,} to write"
    return said + (f": {_price(price, read, written):.2f} by the prices given." if price else ".")


def _price(price: Sequence[float], read: float, written: float) -> float:
    return (price[0] * read + price[1] * written) / 1e6


def _as_text(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def ask_all(
    endpoint: Endpoint, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str], *, cache: Path
) -> Judged:
    """The endpoint's verdict on two answers to each prompt, asked in both orders.

    Equal answers are a tie without a question. A prompt counts where each of its two replies holds one verdict; a
    missing verdict is not guessed. Replies are kept in `cache` under a hash of the question, so that the same call
    goes on where an earlier one stopped.

    Raises:
        RecipeError: If the endpoint refuses the key, the model or the address, or answers nothing at all.
    """
    rows = [row for row, (one, other) in enumerate(zip(first, second, strict=True)) if one.strip() != other.strip()]
    bodies = [
        request_body(endpoint, QUESTION.format(conversation=_as_text(prompts[row]), first=one[row], second=other[row]))
        for row in rows
        for one, other in ((second, first), (first, second))
    ]
    keys = [hashlib.sha256(f"{endpoint.url} {body}".encode()).hexdigest() for body in bodies]
    replies = {entry.pop("key"): entry for entry in read_jsonl(cache)}
    missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in replies}
    say(f"Asking {endpoint.model} {len(missing):,} of {len(keys):,} questions; the other replies are in {cache}.")
    failed = _ask_missing(endpoint, missing, replies, cache, begun=len(missing) < len({*keys}))
    failures = [failed[key] for key in keys if key in failed]
    if failures and len(failures) == len(keys):
        raise RecipeError(f"{endpoint.url} answered nothing: {failures[0]}. Call it again: the answers are kept.")
    found = [replies[key] for key in keys if key in replies]
    said = [read_verdict(replies[key]["text"]) if key in replies else None for key in keys]
    verdicts = np.array(said, float).reshape(-1, 2)  # (rows, orders); None becomes NaN
    won = np.full(len(prompts), 0.5)
    won[rows] = (verdicts[:, 0] + 1 - verdicts[:, 1]) / 2
    facts = {
        "requests": len(keys),
        "from_cache": len(keys) - len(missing),
        "equal_answers": len(prompts) - len(rows),
        "unreadable": said.count(None) - len(failures),
        "failed": len(failures),
        "failures": sorted(set(failures)),
        **_habits(verdicts),
        **_spent(endpoint, found),
    }
    return Judged(won, facts=facts)


def read_verdict(text: str) -> float | None:
    """Returns 1 if a reply says that A is better, 0 for B, 0.5 for neither; None unless it says one of these alone."""
    said = {VERDICTS[letter] for letter in re.findall(r"\[\[([ABC])\]\]", text)}
    return said.pop() if len(said) == 1 else None


def _habits(verdicts: Array) -> dict[str, Any]:
    """Shares of verdicts for the answer that stands first, and of prompts with the same verdict in both orders."""
    whole = verdicts[~np.isnan(verdicts).any(axis=1)]
    return {
        "prefers_first": share(verdicts[np.isin(verdicts, (0, 1))] == 1),
        "same_in_both_orders": share(whole[:, 0] == 1 - whole[:, 1]),
    }


def _spent(endpoint: Endpoint, replies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tokens of the replies, read and written, and their cost where the endpoint's price is known."""
    tokens = [sum((reply.get("usage") or {}).get(name) or 0 for reply in replies) for name in USAGE]
    cost = _price(endpoint.price, *tokens) if endpoint.price else None
    return {"tokens": dict(zip(("read", "written"), tokens, strict=True)), "cost": cost}


def share(hits: NDArray[Any]) -> dict[str, Any] | None:
    """The share of hits that are known, with its Wilson interval; None where there is nothing to count."""
    known = hits[~np.isnan(hits)]
    return asdict(wilson(float(known.sum()), len(known))) if len(known) else None


def _ask_missing(
    endpoint: Endpoint, missing: Mapping[str, str], replies: dict[str, Any], cache: Path, *, begun: bool
) -> dict[str, str]:
    """Puts what is replied into `replies` and the cache, and returns why the other questions failed.

    Raises:
        RecipeError: If the endpoint refuses all requests, or, unless it has `begun`, has no reply to the first ones.
    """
    failures: dict[str, str] = {}
    silent, stopped = 0, threading.Event()
    write_jsonl(cache, ({"key": key, **reply} for key, reply in replies.items()))  # without a line that was cut short
    pool = ThreadPoolExecutor(endpoint.workers)
    asked: dict[Future[dict[str, Any]], str] = {}
    with cache.open("a", encoding="utf-8") as file:
        try:
            asked |= {pool.submit(ask, endpoint, body, stopped): key for key, body in missing.items()}
            for done in tqdm(_as_they_come(asked, endpoint), total=len(asked), desc="Judging"):
                try:
                    _keep(file, replies, asked[done], done.result())
                    begun, silent = True, 0
                except OSError as error:
                    failures[asked[done]] = str(error)
                    silent += isinstance(error, NoReplyError)
                if silent >= min(endpoint.workers, len(asked)):  # one after the other
                    told = f"{endpoint.url} answered nothing: {failures[asked[done]]}"
                    if not begun:
                        raise RecipeError(f"{told}. Call it again: the answers are kept.")
                    say(f"{told}. It is asked no more; the same call asks again for what is missing.", always=True)
                    break
        finally:  # Ctrl-C, or a key that is refused: nobody waits for another try, and replies that cost money are kept
            stopped.set()
            pool.shutdown(cancel_futures=True)
            for late, key in asked.items():
                if key not in replies and not late.cancelled() and late.exception() is None:
                    _keep(file, replies, key, late.result())
    return dict.fromkeys(missing.keys() - replies.keys(), "not asked, as nothing was answered any more") | failures


def _keep(file: TextIO, replies: dict[str, Any], key: str, reply: dict[str, Any]) -> None:
    replies[key] = reply
    file.write(json.dumps({"key": key, **reply}) + "\n")
    file.flush()


def _as_they_come(asked: Mapping[Future[dict[str, Any]], str], endpoint: Endpoint) -> Iterator[Future[dict[str, Any]]]:
    """Yields each question once it has ended, and tells the user where none ends for long."""
    pending, since = set(asked), time.monotonic()
    while pending:
        done, pending = wait(pending, timeout=PATIENCE, return_when=FIRST_COMPLETED)
        since = time.monotonic() if done else since
        if not done:
            say(
                f"{endpoint.model} has not answered for {time.monotonic() - since:.0f} s. A question is given up after "
                f"{endpoint.deadline:.0f} s. Ctrl-C ends the judging and keeps the replies."
            )
        yield from done
