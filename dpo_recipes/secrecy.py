"""Keeps keys, tokens and passwords among the flags out of every file and every printed line."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
NAMES = re.compile(
    r"(?<!pad_)(?<!eos_)(?<!bos_)(?<!unk_)(?<!mask_)token$|key$|passwo?r?d$|secret$|authorization$|credentials?$", re.I
)
"""Names of settings, and of fields within one, whose value is a secret."""
KEYS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[\w-]{20,}|gh[opsu]_\w{30,}|github_pat_\w{30,}|AKIA[A-Z0-9]{16})|"
    r"-+BEGIN [A-Z ]*PRIVATE KEY"
)
"""Keys of well-known services, which show by how they begin."""
_PATH = re.compile(r"(?<![\w:/.~<\\])(~|/[\w.+-]+|[A-Za-z]:(?=[\\/]+Users\b))(?:[\\/]+[\w.@+-]+)+")
_HOMES = ("~", "/home", "/Users", "/root", "/mnt", "/scratch", "/workspace")
_SYSTEM = ("/bin", "/dev", "/etc", "/proc", "/sys", "/usr")  # the same everywhere


def hide(text: str, secrets: Iterable[str]) -> str:
    """The text with stars in place of each secret, also where the secret is quoted for a URL or in JSON."""
    forms = {form for one in secrets if one for form in (one, quote(one, safe=""), json.dumps(one)[1:-1])}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, HIDDEN)
    return text


def hide_flags(words: Sequence[str]) -> list[str]:
    """The words of a command line with stars in place of each secret."""
    secrets = secrets_of(words)
    return [hide(word, secrets) for word in words]


def secrets_of(words: Sequence[str]) -> list[str]:
    """The secrets among the words of a command line: `--hub_token X`, `--x '{"token": "X"}'`, `http://me:X@host`."""
    found = []
    for word, after in zip(words, [*words[1:], "--"], strict=False):
        name, joined, value = word.partition("=")
        if name.startswith("--") and NAMES.search(name):
            found += [value] if joined else [] if after.startswith("--") else [after]
        found += re.findall(r"\w://([^/\s@]+)@", word)
        pairs = re.findall(r'"([\w-]+)"\s*:\s*"([^"]+)"', word) + re.findall(r"[?&#;]([\w-]+)=([^&#;\s]+)", word)
        found += [secret for key, secret in pairs if NAMES.search(key)]
    return found


def secrets_in(value: Any) -> list[str]:
    """The text of every field with a secret's name, at any depth of dicts and lists."""
    if isinstance(value, dict):
        own = [text for name, text in value.items() if isinstance(text, str) and NAMES.search(str(name))]
        return own + [secret for inner in value.values() for secret in secrets_in(inner)]
    return [secret for inner in value for secret in secrets_in(inner)] if isinstance(value, list) else []


def take_secrets(training_args: Any) -> None:
    """Moves the Hub's token from the settings, which every checkpoint keeps, to where the Hub's client looks for it."""
    options = training_args.model_init_kwargs or {}
    tokens = [options.pop("use_auth_token", None), options.pop("token", None), training_args.hub_token]  # it wins
    training_args.hub_token = None
    for token in tokens:
        if isinstance(token, str) and token != HIDDEN:  # a second call finds HIDDEN on the command line
            os.environ["HF_TOKEN"] = token


def machine_paths(text: str) -> list[str]:
    """Absolute paths in a text that show folders of a machine: this one's, or a home folder of any other one."""
    return [found[0] for found in _PATH.finditer(text) if _is_of_a_machine(found[1])]


def shorten_paths(text: str) -> str:
    """The text with the last part of each path in place of the whole path, where it shows folders of a machine."""
    return _PATH.sub(lambda found: re.split(r"[\\/]", found[0])[-1] if _is_of_a_machine(found[1]) else found[0], text)


def _is_of_a_machine(top: str) -> bool:
    return top in _HOMES or top.endswith(":") or (top not in _SYSTEM and Path(top).is_dir())
