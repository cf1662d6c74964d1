"""Dataset adapters: one function for each dataset turns raw rows into preference pairs; every row is kept or counted.

A dataset adapter of your own reads one row and says which columns it needs:

    def forum(dataset: Dataset) -> Dataset:
        return adapt(dataset, forum_pair, name="forum", columns=["question", "best", "worst", "votes"])

    def forum_pair(row: Row) -> Pair:
        if row["votes"] < 3:
            raise Drop("too_few_votes")
        return {
            "prompt": as_messages(row["question"], role="user"),
            "chosen": as_messages(row["best"], role="assistant"),
            "rejected": as_messages(row["worst"], role="assistant"),
        }

`adapt` then checks every pair (`check_pair`), counts each drop in the current ledger (ledger.py) and returns the pairs
that are left. Columns named preference_strength, margin, source or id are kept, and tools and chat_template_kwargs go
to the chat template. Every other column that holds text, and that the function does not read, is named in the account.
`margin` enters the loss of RewardTrainer; `load_rows` therefore renames a dataset's own margin to preference_strength,
unless `--columns margin=margin` asks for it.
"""

from dpo_recipes.dataset_adapters.adapters import hh_rlhf as hh_rlhf
from dpo_recipes.dataset_adapters.adapters import plain_text as plain_text
from dpo_recipes.dataset_adapters.adapters import preference_jsonl as preference_jsonl
from dpo_recipes.dataset_adapters.adapters import prompts_alone as prompts_alone
from dpo_recipes.dataset_adapters.adapters import recognise as recognise
from dpo_recipes.dataset_adapters.adapters import sharegpt_pairs as sharegpt_pairs
from dpo_recipes.dataset_adapters.adapters import shp as shp
from dpo_recipes.dataset_adapters.adapters import ultrafeedback_binarized as ultrafeedback_binarized
from dpo_recipes.dataset_adapters.adapting import DROP_REASONS as DROP_REASONS
from dpo_recipes.dataset_adapters.adapting import PAIR_FEATURES as PAIR_FEATURES
from dpo_recipes.dataset_adapters.adapting import Drop as Drop
from dpo_recipes.dataset_adapters.adapting import Message as Message
from dpo_recipes.dataset_adapters.adapting import Pair as Pair
from dpo_recipes.dataset_adapters.adapting import Row as Row
from dpo_recipes.dataset_adapters.adapting import adapt as adapt
from dpo_recipes.dataset_adapters.adapting import as_messages as as_messages
from dpo_recipes.dataset_adapters.adapting import check_pair as check_pair
from dpo_recipes.dataset_adapters.adapting import keep_pairs as keep_pairs
from dpo_recipes.dataset_adapters.adapting import map_rows as map_rows
from dpo_recipes.dataset_adapters.adapting import number as number
from dpo_recipes.dataset_adapters.adapting import rename_columns as rename_columns
from dpo_recipes.dataset_adapters.gsm8k import final_answer as final_answer
from dpo_recipes.dataset_adapters.gsm8k import gsm8k as gsm8k
from dpo_recipes.dataset_adapters.gsm8k import is_right as is_right
from dpo_recipes.dataset_adapters.gsm8k import marked_solutions as marked_solutions
from dpo_recipes.dataset_adapters.gsm8k import right_against_wrong as right_against_wrong
from dpo_recipes.dataset_adapters.oasst import oasst1 as oasst1
