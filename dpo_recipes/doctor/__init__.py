"""`dpo-recipes doctor`: checks that this machine can train every recipe.

miniature.py    random tiny models, rows in every published schema, and the flags that train a recipe on them
"""

from dpo_recipes.doctor.miniature import miniature_flags as miniature_flags
