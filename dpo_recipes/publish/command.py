"""The verbs `publish` and `template`."""

import argparse
import sys
from typing import Any

from dpo_recipes.flags import YES_OR_NO, add_trust, given
from dpo_recipes.machine import set_environment
from dpo_recipes.terminal import runnable


def add_parser(commands: Any) -> None:
    """Adds the verbs to the subparsers of `dpo-recipes`."""
    parser = commands.add_parser(
        "publish",
        help="upload a finished run to the Hub, after checks",
        usage="%(prog)s RUN --hub_id YOU/NAME [--weights adapter|merged] [--public] [--dry_run]",
        epilog="The token is that of `hf auth login`, or HF_TOKEN.",
        examples=[
            "publish outputs/hh_rlhf_lora --hub_id you/hh-rlhf-lora --dry_run",
            "publish outputs/hh_rlhf_lora_merged --hub_id you/hh-rlhf --weights merged",
        ],
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a run, or of a merge of one")
    parser.add_argument("--hub_id", metavar="YOU/NAME", required=True, help="the repository, made where it is missing")
    kinds = "by default what the folder holds"
    parser.add_argument("--weights", choices=("adapter", "merged"), help=kinds)
    parser.add_argument("--base", metavar="NAME", help="the base model at the Hub, if the run names a local folder")
    parser.add_argument("--license", metavar="ID", help="such as apache-2.0; by default the base model's")
    parser.add_argument("--public", **YES_OR_NO, help="let everybody see it; by default it is private")
    parser.add_argument("--dry_run", **YES_OR_NO, help="show files, sizes and the card, and upload nothing")
    parser.add_argument("--anyway", **YES_OR_NO, help="publish an unhealthy run")
    parser.set_defaults(call=_publish)

    words = "check the chat template of an exported model, or write Ollama's Modelfile"
    checking = commands.add_parser(
        "template",
        help=words,
        usage="%(prog)s MODEL [--against FILE | --write FILE]",
        examples=["template outputs/quickstart_merged --write Modelfile", "template outputs/mine --against model.gguf"],
    )
    checking.add_argument("model", metavar="MODEL", help="a folder or Hub name with the tokenizer of the training")
    files = checking.add_mutually_exclusive_group()
    files.add_argument("--against", metavar="FILE", help="a Modelfile, a .gguf file or a generation_config.json")
    files.add_argument("--write", metavar="FILE", help="write a Modelfile with the model's own template")
    add_trust(checking)
    checking.set_defaults(call=_check_template)


def _publish(options: argparse.Namespace, flags: list[str]) -> int:
    set_environment()
    from dpo_recipes.publish.upload import UploadError, publish  # imports torch

    try:
        publish(**given(options))
    except UploadError as error:
        sys.stderr.write(f"{runnable(str(error))}\n")
        return 1
    return 0


def _check_template(options: argparse.Namespace, flags: list[str]) -> int:
    set_environment()
    from dpo_recipes.publish.template import check_template  # imports torch

    return check_template(**given(options))
