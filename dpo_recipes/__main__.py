"""`python -m dpo_recipes` is the command `dpo-recipes`."""

import sys

from dpo_recipes.cli import main

sys.exit(main())
