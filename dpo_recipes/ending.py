"""Ends a recipe: the exit status and the one message that say what was wrong and what to do."""

import errno
import faulthandler
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypeVar

from dpo_recipes.errors import RecipeError, UnhealthyRunError
from dpo_recipes.secrecy import hide, secrets_of
from dpo_recipes.terminal import outlive_the_terminal, quiet_libraries, runnable

Result = TypeVar("Result")
SECRETS: set[str] = set()
"""Secrets among the flags of this process; no message shows them."""


def run(main: Callable[[], Result]) -> Result:
    """Returns the result of `main`, or ends the process with a message and an exit status that scripts can rely on.

    The statuses: 0 done; 1 the work failed; 2 the call or the data was wrong and nothing was started; 130 or 143
    interrupted.
    """
    quiet_libraries()
    faulthandler.register(signal.SIGUSR2, file=2)  # the launcher asks a run that stands still where it is
    outlive_the_terminal()
    SECRETS.update(secrets_of(sys.argv))
    try:
        return main()
    except RecipeError as error:
        _leave(2, str(error))
    except UnhealthyRunError as error:
        _leave(1, str(error))
    except KeyboardInterrupt:
        _leave(130, "Interrupted outside of training. What was saved before is kept.")
    except Exception as error:
        if meaning := _meaning(error):
            _leave(*meaning)
        raise


def _meaning(error: Exception) -> tuple[int, str] | None:
    """The exit status and the message for an error of a library; None if its cause is not known."""
    text = str(error)
    if is_disk_full(error):
        return 1, f"A disk is full. {_about_the_disk(error)}"
    if blamed := _blame(text):
        return 2, blamed
    if isinstance(error, OSError) and "huggingface.co" in text:
        return 2, unreachable("the model or dataset", error)
    if type(error).__name__ == "OutOfMemoryError":
        return 1, (
            f"Out of memory: {text.splitlines()[0]} Halve --tokens_per_step, or --per_device_train_batch_size where "
            "that is 0 (the pairs per update stay the same), lower --max_length, or use a 4-bit recipe."
        )
    return None


def unreachable(name: str, error: BaseException) -> str:
    """The message for a model or dataset that cannot be loaded."""
    if blamed := _blame(str(error)):
        return blamed
    said = str(error).splitlines()[0]
    if Path(name).is_dir():
        return f"Cannot load {name}: {said} Its files are damaged or of another library: save the model again."
    return (
        f"Cannot load {name}: {said} Without the Hub, give a local folder with --model_name_or_path, or run the "
        "quickstart, which needs no network: dpo-recipes train quickstart."
    )


NO_TOKENIZER = (
    "There is no tokenizer beside the model. Save it into the model's folder: "
    "AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)."
)
_BLAME = {
    r"Couldn't instantiate the backend tokenizer": NO_TOKENIZER,
    r"trust_remote_code=True": "The model has code of its own, which runs only if you say so: read it, then give "
    "--trust_remote_code true.",
    r"Target modules .* not found|No modules were targeted": "lora_target_modules names no module of this model. Take "
    "all-linear; a single name is a regular expression of the whole path: '.*q_proj'.",
}
"""The meaning of a library's error for the user, by a pattern of the error's text."""


def _blame(text: str) -> str | None:
    """The meaning of a library's error for the user, with its first line; None if the error is not known."""
    return next((f"{meant} ({text.splitlines()[0]})" for sign, meant in _BLAME.items() if re.search(sign, text)), None)


def _about_the_disk(error: Exception) -> str:
    """Advice for a full disk, by whether the caches or the run's folder fill it."""
    frames = traceback.extract_tb(error.__traceback__)
    if any(re.search(r"/(datasets|huggingface_hub)/", frame.filename) for frame in frames):
        return (
            "That disk holds the cache of datasets and models. Free some space there, or name a folder on another disk "
            "with the variable HF_HOME."
        )
    return (
        "Complete checkpoints are kept: free some space and continue with --resume_from_checkpoint true, or keep fewer "
        "with --save_total_limit."
    )


def is_disk_full(error: Exception) -> bool:
    """Returns True if an error of Python, safetensors or torch says that a disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # safetensors and torch.save raise errors of their own, and the last one names no reason.
    signs = ("No space left on device", "File too large", "PytorchStreamWriter failed writing", "inline_container.cc")
    return any(sign in str(error) for sign in signs)


def _leave(status: int, message: str) -> NoReturn:
    """Ends the process; the main process shows the message, without secrets, and the launcher that of another one."""
    message = runnable(hide(message, SECRETS))
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stderr.write(f"{message}\n")
    elif file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
    raise SystemExit(status)
