"""The preflight.json that the tests make pages of."""


def histogram(total=60):
    return {"mean": 5.0, "p50": 5, "p90": 8, "p99": 9, "max": 9, "total": total} | {
        "histogram": {"edges": [1.0, 5.0, 9.0], "counts": [4, 2]}
    }


def rule(accuracy, label):
    numbers = {"accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "decided": 0.5, "n": 300}
    return {"label": label, **numbers, "rows": ["row 1", "row 2"]}


def preflight():
    """Contents of a preflight.json that has every section."""
    account = {"rows": 10, "in_pairs": 0, "pairs_made": 0, "moved": -2, "not_sampled": 1, "kept": 4, "shortened": 1}
    dropped = {
        "too_long": {
            "count": 3,
            "counted_by": "preflight",
            "first": ["pairs.jsonl, line 11", "pairs.jsonl, line 22", "pairs.jsonl, line 33"],
        }
    }
    side = {"tokens": ["Us", "er", ":\n", "Hi", "<eos>"], "ids": [7, 8, 9, 10, 1], "trained": [0, 0, 0, 1, 1]}
    quantiles = {"logp_per_token": {"p5": -4.0, "p50": -2.5, "p95": -1.0}, "surplus": {}, "far": 0.25}
    none = {"count": 0, "of": 300, "rows": []}
    return {
        "dataset": "some/pairs",
        "part": "the first rows of each split",
        "recipe": "hh_rlhf_lora",
        "model": "a-model",
        "max_length": 512,
        "thresholds": {"longer": 0.7, "too_long": 0.05},
        "reasons": {"too_long": "over max_length"},
        "splits": {
            "train": account | {"dropped": dropped},
            "test": account | {"dropped": {}, "rows": 3, "moved": 2, "kept": 4, "shortened": 0},
        },
        "total": account | {"dropped": dropped, "rows": 13, "kept": 8},
        "tokens": {
            split: {side: histogram() for side in ("prompt", "chosen", "rejected")}
            | {"cut_from": {"prompt": 77, "chosen": 0, "rejected": 0}}
            | {"shortened": 1, "without_eos": 2, "completion_at_risk": 3}
            for split in ("train", "test")
        },
        "rendered": [
            {
                "split": "train",
                "row": "pairs.jsonl, line 5",
                "sides": {name: side | {"prompt_tokens": 3} for name in ("chosen", "rejected")},
            }
        ],
        "signals": {
            "pairs": 300,
            "prompts": 290,
            "baselines": {"longer": rule(0.8, "The longer answer"), "list": rule(0.5, "The answer with a list")},
            "openers": [{"word": "certainly", "chosen": 0.3, "rejected": 0.01}],
            "duplicates": {"count": 9, "of": 300, "rows": [["row 40", "row 4"], ["row 50", "row 5"]]},
            **dict.fromkeys(("near_duplicates", "contradictions", "near_leaks"), none),
            "frequent_prompt": {"count": 17, "of": 300, "rows": ["row 3", "row 4"], "text": "What is the time?"},
        },
        "off_distribution": {
            **{"n": 256, "far_from": 1.0, "agrees": 0.55, "rows": ["row 8", "row 9"]},
            **{"chosen": quantiles, "rejected": quantiles | {"far": 0.61}},
        },
        "cost": {
            **{"pairs_per_epoch": 300, "updates": 38, "padded_tokens": 2000, "real_tokens": 1000},
            **{"padding_share": 0.5, "prefix_share": 0.4, "shared_prefix_speedup": 3.3},
            **{"memory": {"frozen weights": 3e9, "activations": 2e9}, "memory_total": 5e9},
            "fits": {"name": "the 24GB card", "bytes": 24e9, "fits": True},
        },
        "findings": [
            {"name": "longer", "level": "warning", "text": "The longer answer wins 80%.", "remedy": "Balance them."}
        ],
        "verdict": "warnings",
    }
