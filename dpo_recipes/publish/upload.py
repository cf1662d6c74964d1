"""Publishes a run: lists its files, refuses what must not be public, and uploads the rest in one commit."""

import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, get_session, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError

from dpo_recipes.errors import RecipeError
from dpo_recipes.publish.gather import Publication, gather
from dpo_recipes.secrecy import hide
from dpo_recipes.terminal import say, shown

PATIENCE = 300.0  # seconds without a byte from the Hub; its library by itself waits for ever
REFUSED = {
    401: "the Hub does not know this token. Log in again: hf auth login",
    402: "the account has no room or no plan for that",
    403: "this token may not write there. Name a repository of yours with --hub_id, or take a token that may write",
    404: "there is no such owner, or this token may not see it. Check --hub_id",
    409: "somebody else changed the repository at the same time",
}
"""Meaning of the statuses of the Hub that stay the same until the user does something."""
ANY_WEIGHTS = (".safetensors", ".bin", ".gguf", "adapter_config.json")


class UploadError(RuntimeError):
    """The upload was begun and did not end; the message says how to finish."""


def publish(run: str, hub_id: str, *, public: bool = False, dry_run: bool = False, **options: object) -> None:
    """Publishes a run at the Hub, privately unless `public`.

    Args:
        run: The folder of a run, or of a merged model.
        hub_id: Name of the repository.
        public: Let everybody see it.
        dry_run: Show files, sizes and the card, and upload nothing.
        options: Of `gather`.

    Raises:
        RecipeError: If something speaks against it; all reasons are in the message.
        UploadError: If the upload was begun and did not end.
    """
    get_session().timeout = PATIENCE
    found = gather(run, hub_id, **options)  # type: ignore[arg-type]
    _show(found, public=public, card=dry_run)
    problems = [*found.problems, *([] if dry_run else _no_way_there())]
    if problems:
        raise RecipeError("Nothing is published.\n" + "\n".join(f"- {problem}" for problem in problems))
    if dry_run:
        say("\nNothing is uploaded (dry_run).")
        return
    url = upload(found.files, hub_id, public=public, kind=found.kind)
    say(f"\nPublished     {url}")


def _no_way_there() -> list[str]:
    """The reasons why nothing can be uploaded from here."""
    if is_offline_mode():
        return ["HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it."]
    return [] if get_token() else ["There is no login at the Hub. Call `hf auth login`, or set HF_TOKEN."]


def _show(found: Publication, *, public: bool, card: bool) -> None:
    """Prints the files with their sizes, the notes, and the card if asked for."""
    sizes = {name: len(held) if isinstance(held, bytes) else held.stat().st_size for name, held in found.files.items()}
    lines = [f"{size:>14,}  {name}" for name, size in sizes.items()]
    who = "public" if public else "private"
    say(f"For {found.hub_id} ({who}): {len(sizes)} files, {sum(sizes.values()):,} bytes\n" + "\n".join(lines))
    if card:
        held = found.files.get("README.md", b"")
        say(f"\n--- README.md\n{held.decode() if isinstance(held, bytes) else ''}---")
    for note in found.notes:
        say(f"Note: {note}")


def upload(files: Mapping[str, Path | bytes], hub_id: str, *, public: bool, kind: str) -> str:
    """Uploads the files in one commit, so that readers see all of them or none, and returns the address.

    Raises:
        RecipeError: If the Hub refuses, or the repository is not as asked.
        UploadError: If the connection or the Hub fails.
    """
    api, before = HfApi(), None
    try:
        repository = api.create_repo(hub_id, private=not public, exist_ok=True).repo_id
        info = api.model_info(repository)
        before = info.sha
        _check_repository(repository, info, files, public=public)
        operations = [CommitOperationAdd(name, held) for name, held in files.items()]
        message = f"Publish the {'LoRA adapter' if kind == 'adapter' else 'model'} with dpo-recipes"
        api.create_commit(repository, operations, commit_message=message)
        return f"{api.endpoint}/{repository}"
    except KeyboardInterrupt:
        sys.stderr.write(f"{_how_to_finish(api, hub_id, before)}\n")
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        _explain(error, api, hub_id, before)


def _check_repository(name: str, info: ModelInfo, files: Mapping[str, object], *, public: bool) -> None:
    """Raises RecipeError for a repository that everybody sees, unasked, or that would become a mixture of models."""
    if not (info.private or public):
        raise RecipeError(f"{name} is there and public. Give --public if all may see it, or another --hub_id.")
    there = [sibling.rfilename for sibling in info.siblings or ()]
    if others := [file for file in there if file.endswith(ANY_WEIGHTS) and file not in files]:
        raise RecipeError(
            f"{name} holds {', '.join(others[:3])}, weights of another model, which these files would not replace. "
            "Delete them there, or name another repository with --hub_id."
        )


def _explain(error: Exception, api: HfApi, hub_id: str, before: str | None) -> NoReturn:
    """Raises the error that a user understands."""
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
    said = shown(hide(" ".join(str(cause).split())[:300], [get_token() or ""])).rstrip(".")
    remedy = _how_to_finish(api, hub_id, before)
    if status in REFUSED:
        raise RecipeError(f"The Hub refused {hub_id} ({status}): {REFUSED[status]}. {remedy} ({said})") from error
    raise UploadError(f"The upload to {hub_id} did not end: {said or type(cause).__name__}. {remedy}") from error


def _how_to_finish(api: HfApi, hub_id: str, before: str | None) -> str:
    """Sentences about what the Hub holds now, and the command that finishes the work."""
    after = before
    with suppress(HTTPError, OSError, ValueError):
        after = api.model_info(hub_id, timeout=10.0).sha
    state = "The repository shows no new file, because all of them appear with the last step."
    if before and after != before:
        state = f"The repository has changed meanwhile: look at {api.endpoint}/{hub_id}."
    again = shlex.join(["dpo-recipes", *sys.argv[1:]])
    return f"{state} To finish, call the same command again, which sends only what is missing: {again}."
