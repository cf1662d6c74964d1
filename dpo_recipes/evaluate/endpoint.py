"""Sends questions to an OpenAI-compatible endpoint, with retries and deadlines, and keeps its key out of every text."""

import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

from dpo_recipes.errors import RecipeError
from dpo_recipes.secrecy import hide, secrets_in

KEY = "OPENAI_API_KEY"
TRIES = 6  # of a request
LARGEST = 10_000_000  # bytes of a reply that are read
LONGEST_WAIT = 120.0  # seconds between two tries; an endpoint that asks for more is given up
GRACE = 3.0  # seconds that open requests may still take after Ctrl-C or a refusal
REPLY_TOKENS = 512
USAGE = ("prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint and the way to ask it. Its key stays in the environment."""

    url: str  # without /chat/completions
    model: str
    workers: int = 8  # requests at a time
    price: tuple[float, float] | None = None  # of a million tokens, read and written
    options: Mapping[str, Any] = field(default_factory=dict)  # further fields of a request; None removes a field
    pause: float = 1.0  # seconds before the second try; each later pause is twice as long
    timeout: float = 120.0  # seconds of a try, from the request to the last byte of the reply
    deadline: float = 300.0  # seconds of a question, over all its tries


class RefusedQuestionError(OSError):
    """The endpoint refuses this question, however often it is asked."""


class NoReplyError(OSError):
    """No try had a reply, and the question itself is not to blame."""


def check_address(url: str) -> None:
    """Raises RecipeError unless requests can be sent to the URL with the key.

    A URL that holds a secret is refused too, because it is written into the results.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        bad = not parts.hostname or re.search(r"\s", url) or parts.port == 0
    except ValueError:
        bad = True
    if bad:
        shown = re.sub("//[^/]*@", "//***@", re.split("[?#;]", url)[0])
        raise RecipeError(f"{shown} is no address of an endpoint. It looks like https://HOST/v1.")
    if "@" in parts.netloc or parts.query or parts.fragment or ";" in parts.path:
        raise RecipeError(f"The address of an endpoint is kept with the results: put its key into ${KEY}, not there.")
    if not re.fullmatch(r"[!-~]*", _key()):
        raise RecipeError(f"${KEY} holds a character that no key has.")


def _key() -> str:
    return os.environ.get(KEY, "").strip()


def request_body(endpoint: Endpoint, question: str) -> str:
    """The JSON of a request with one question."""
    fields = {"model": endpoint.model, "messages": [{"role": "user", "content": question}]}
    fields |= {"temperature": 0, "max_tokens": REPLY_TOKENS} | dict(endpoint.options)
    return json.dumps({name: value for name, value in fields.items() if value is not None})


def ask(endpoint: Endpoint, body: str, stopped: threading.Event) -> dict[str, Any]:
    """The reply to one request: `text`, and `usage` in tokens.

    A failure that may pass is tried again after a pause, which grows with each try.

    Args:
        endpoint: Receives the request.
        body: As `request_body` writes it.
        stopped: Ends the tries once it is set.

    Raises:
        NoReplyError: If no try had a reply.
        RefusedQuestionError: If this request is refused.
        RecipeError: If every request would be refused.
    """
    sent = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {_key()}"} if _key() else {})
    request = urllib.request.Request(f"{endpoint.url}/chat/completions", data=body.encode(), headers=sent)
    secrets = [_key(), *secrets_in(dict(endpoint.options))]
    end = time.monotonic() + endpoint.deadline
    for attempt in range(TRIES):
        pause = endpoint.pause * 2**attempt * random.uniform(1, 1.5)  # spreads the requests
        try:
            seconds = min(endpoint.timeout, end - time.monotonic())
            status, reason, headers, data = _within(seconds, stopped, lambda: _exchange(request, endpoint.timeout))
            if status < 300:
                return _read_reply(data, secrets)
        except (OSError, http.client.HTTPException) as error:
            problem = hide(f"no reply ({getattr(error, 'reason', None) or error or type(error).__name__})", secrets)
        except (ValueError, LookupError, TypeError, RecursionError):
            problem = "a reply that is no chat completion"
        else:
            problem = hide(f"HTTP {status} {reason}", secrets)
            _refuse(endpoint, status, problem, hide(data.decode(errors="replace"), secrets))
            after = headers.get("Retry-After", "")
            if re.fullmatch(r"\d+(\.\d+)?", after):
                pause = max(pause, float(after))
                problem += f", wait {after} s" if pause > LONGEST_WAIT else ""
        too_late = pause > min(LONGEST_WAIT, end - time.monotonic())
        if attempt == TRIES - 1 or too_late or stopped.wait(pause):
            break
    raise NoReplyError(f"{problem}, in {attempt + 1} tries")


def _refuse(endpoint: Endpoint, status: int, problem: str, said: str) -> None:
    """Raises an error for a status that stays the same however often the endpoint is asked."""
    if status in (401, 403, 404) or status < 400:
        raise RecipeError(
            f"{endpoint.url} refuses: {problem}. Check the URL, --judge_model {endpoint.model} and ${KEY}, "
            "and call it again: the answers are kept."
        )
    if status < 500 and status not in (408, 409, 429):
        raise RefusedQuestionError(f"{problem}: {said[:300]}")


def _exchange(request: urllib.request.Request, timeout: float) -> tuple[int, str, Message, bytes]:
    """Status, reason, headers and body of the reply, whatever the status."""
    try:
        response = _OPENER.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        response = error
    data = b""
    with response, suppress(*(() if response.status < 300 else (OSError, http.client.HTTPException))):
        data = response.read(LARGEST)
    return response.status, response.reason, response.headers, data


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the question and the key are for one host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Returns None, which makes the redirect an error."""


_OPENER = urllib.request.build_opener(_NoRedirect)


def _within(seconds: float, stopped: threading.Event, call: Callable[[], Any]) -> Any:
    """Returns what the call returns, and leaves its thread behind once the time is over.

    The timeout of a socket is no deadline: a reply of one byte a second, or a name that is not resolved, never ends.

    Raises:
        TimeoutError: If the call takes longer, or longer than `GRACE` after a stop.
    """
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    end = time.monotonic() + seconds
    while not future.done() and not stopped.is_set() and time.monotonic() < end:
        wait([future], timeout=min(0.2, max(0.0, end - time.monotonic())))
    if stopped.is_set():
        wait([future], timeout=min(GRACE, max(0.0, end - time.monotonic())))
    if not future.done():
        raise TimeoutError(f"nothing whole in {seconds:.0f} s")
    return future.result()


def _read_reply(data: bytes, secrets: Sequence[str]) -> dict[str, Any]:
    """Text of a chat completion, without secrets, and its usage in tokens.

    Raises:
        ValueError, LookupError, TypeError: If the data is no chat completion.
    """
    reply = json.loads(data)
    text, usage = reply["choices"][0]["message"]["content"], reply.get("usage")
    if not isinstance(text, str | None):
        raise TypeError
    counts = {name: usage.get(name) for name in USAGE} if isinstance(usage, dict) else {}
    whole = (text or "").encode(errors="replace").decode()  # half a surrogate pair cannot be written
    return {
        "text": hide(whole, secrets),
        "usage": {name: count for name, count in counts.items() if type(count) is int},
    }
