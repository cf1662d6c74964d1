"""Messages, the pair that a row becomes, and the contract that every pair keeps."""

from datasets import Dataset

from dpo_recipes.dataset_adapters.ledger import Ledger


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def outcome(dataset_adapter, row):
    """The pair that a dataset adapter makes of a row, or the reason why it makes none."""
    with Ledger() as ledger:
        pairs = dataset_adapter(Dataset.from_list([row])).to_list()
    reasons = list(ledger.accounts["train"].dropped)
    assert len(pairs) + len(reasons) == 1
    return pairs[0] if pairs else reasons[0]


def keeps_the_contract(pair):
    """True if turns are texts of known roles, the prompt ends in a user turn and the completions are two answers."""
    turns = pair["prompt"] + pair["chosen"] + pair["rejected"]
    return (
        all(turn["role"] in ("system", "user", "assistant") and isinstance(turn["content"], str) for turn in turns)
        and pair["prompt"][-1]["role"] == "user"
        and all(
            side[0]["role"] == "assistant" and side[0]["content"].strip() for side in (pair["chosen"], pair["rejected"])
        )
        and pair["chosen"] != pair["rejected"]
    )
