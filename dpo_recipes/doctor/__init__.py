"""Checks with `dpo-recipes doctor` that this machine is ready to train; the tables can be pasted into an issue.

command.py      the verb: its parser and its four parts
machine.py      versions, cards, memory, disk, profile
compute.py      products, 4-bit layers, attention and gradients compared with more exact ones; the tests use it too
speed.py        time of a step of plain TRL and of shared prompts, with random weights of real sizes
sizes.py        configurations of the models that speed.py can time
recipes.py      every recipe in miniature, in parallel processes
miniature.py    random tiny models, rows in every published schema, and the flags that train a recipe on them
report.py       tables for the screen, as Markdown and as JSON, without anything private
"""

from dpo_recipes.doctor.miniature import miniature_flags as miniature_flags
