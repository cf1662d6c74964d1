"""What the comparison says: numbers that can be computed again from results.json, and words that follow from them."""

import html
import itertools
import json
import math
import re
import statistics as plain
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from browser import seen
from scipy.optimize import minimize

from dpo_recipes import estimates
from dpo_recipes.compare import results as made
from dpo_recipes.compare.plan import Stage
from dpo_recipes.compare.report import LOOKS, write_report
from dpo_recipes.evaluate.measures import MEASURES, SHARES
from dpo_recipes.launch.launch import Launch
from dpo_recipes.pages.page import scale

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>{{ 7 * 7 }} | a | b"
MINUS = "\N{MINUS SIGN}"
PROMPTS, PAIRS, BETAS, SEEDS = 60, 80, ("0.1", "0.3"), (0, 1, 2)


@pytest.fixture(scope="module", autouse=True)
def few_fits():
    """A regression for every resample is what takes the time; fewer resamples of the rest save more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "RESAMPLES_OF_FITS", 10)
        patch.setitem(estimates.estimate.__kwdefaults__, "resamples", 200)
        yield


def run_of(seed, *, reward, kl, tokens=40.0, model=True):
    """Columns of a run as `columns` returns them, drawn."""
    draw = np.random.default_rng(seed)
    lengths = np.round(draw.normal(tokens, 6, PROMPTS))
    nll = lengths * draw.uniform(0.4, 0.6, PROMPTS)
    judged = np.clip(np.round(4 * draw.normal(reward, 0.3, PROMPTS)) / 4, 0, 1)
    return {
        "judge": judged.tolist(),
        "kl": (kl + draw.normal(0, 0.5, PROMPTS) * (kl > 0)).tolist(),
        "tokens": lengths.tolist(),
        "repetition": draw.uniform(0, 0.1, PROMPTS).tolist(),
        "reward_model": (judged + draw.normal(0, 0.2, PROMPTS)).tolist() if model else None,
        "unended": (draw.uniform(size=PROMPTS) < 0.05).astype(float).tolist(),
        "nll": nll.tolist(),
        "scored": (lengths + 1).tolist(),
        "preference_accuracy": draw.choice([0.0, 0.5, 1.0], PAIRS).tolist(),
        "distinct_1": draw.uniform(0.2, 0.3, 3).tolist(),
        "distinct_2": draw.uniform(0.5, 0.6, 3).tolist(),
    }


def cost(seconds, samples, **more):
    return {"seconds": seconds, "gpu_hours": None, "memory_mib": 900, "samples": samples, "tokens": 1000.0} | more


def stage(kind, name, needs=(), beta=None, seed=None):
    return Stage(kind, name, Launch(Path("r"), Path("p"), Path("a"), ()), Path(name), tuple(needs), beta, seed)


def compared(*, betas=BETAS, seeds=SEEDS, ppo=0.75, dpo=0.6, rloo=None, rounds=None, failed=(), without=(), unequal=()):
    """What results.json holds, of drawn runs."""
    algorithms = {"dpo": (dpo, 60.0), "ppo": (ppo, 200.0), "rloo": (rloo, 150.0)}
    algorithms["rounds"] = (rounds, 120.0)
    runs = {f"sft-{seed}": run_of(seed, reward=0.45, kl=0.0) for seed in seeds}
    stages, costs = [], {}
    for seed in seeds:
        reward = stage("reward", f"reward-{seed}", seed=seed)
        costs[reward.name] = cost(50.0, 1408)
        for number, beta in enumerate(betas):
            for place, (kind, (level, seconds)) in enumerate(algorithms.items()):
                one = stage(kind, f"{kind}-{beta}-{seed}", [reward] if kind != "dpo" else [], beta, seed)
                if one.name in without or level is None:
                    continue
                stages.append(one)
                costs[one.name] = cost(seconds, 1408)
                offset = 1000 * (number + 1) + 500 * place
                runs[one.name] = run_of(seed + offset, reward=level - 0.1 * number, kl=3.0 - number, tokens=38.0)
    about = {
        "title": "DPO against PPO",
        "recipe": "quickstart",
        "made": "2027-01-01T00:00+00:00",
        "start": "outputs/quickstart_sft",
        "seeds": list(seeds),
        "betas": list(betas),
        "budget": {"kind": "samples", "detail": "DPO sees 1,408 pairs a seed."},
        "sampling": {"temperature": 0.6, "max_new_tokens": 72},
        "judge": {"name": "the exact reward", "detail": "It is exact.", "order": "No order."},
        "reward_accuracy": {"reward-0": {"mean": 0.912, "low": 0.88, "high": 0.94, "n": 80}},
        "failed": list(failed),
        "prompts": PROMPTS,
        "fairness": [
            {"held": True, "detail": "All started from the same weights."},
            *({"held": False, "detail": detail} for detail in unequal),
        ],
        "hardware": "a machine",
        "versions": ["trl 1.16.0"],
    }
    results = about | made.collect(stages, runs, costs, betas=betas)
    results["verdict"] = made.verdict(results)
    answer = {"label": "DPO, beta 0.1", "algorithm": "dpo", "judge": 0.5, "ended": False, "text": HOSTILE}
    results["samples"] = [{"number": 7, "prompt": HOSTILE, "answers": [answer]}]
    return json.loads(json.dumps(results))


@pytest.fixture(scope="module")
def results(few_fits):
    return compared()


# Computed again, by nothing but the standard library and what results.json holds.


def mean_of_seeds(results, model, name):
    return plain.mean(plain.mean(results["runs"][run][name]) for run in model["names"].values())


def t_interval(values, *, share=False):
    quantile = {2: 12.7062, 3: 4.30265}[len(values)]  # of Student's t, 97.5 %, by number of seeds
    half = quantile * plain.stdev(values) / math.sqrt(len(values))
    low, high = plain.mean(values) - half, plain.mean(values) + half
    return (max(0.0, low), min(1.0, high)) if share else (low, high)


def win_rate(one, other):
    return plain.mean(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(one, other, strict=True))


def test_the_measures_of_every_model_can_be_computed_again(results):
    assert [model["label"] for model in results["models"]] == [
        "SFT",
        *("DPO, beta 0.1", "DPO, beta 0.3", "PPO, beta 0.1", "PPO, beta 0.3"),
    ]
    for model in results["models"]:
        for name in MEASURES:
            found = model[name]
            if name == "surprise":
                own = [results["runs"][run] for run in model["names"].values()]
                begun = [results["runs"][f"sft-{seed}"] for seed in model["names"]]
                values = [
                    (sum(a["nll"]) / sum(a["scored"])) / (sum(b["nll"]) / sum(b["scored"]))
                    for a, b in zip(own, begun, strict=True)
                ]
            else:
                values = [plain.mean(results["runs"][run][name]) for run in model["names"].values()]
            assert found["by_seed"] == pytest.approx(values)
            assert found["mean"] == pytest.approx(plain.mean(values))
            ends = t_interval(values, share=name not in ("judge", "reward_model", "kl", "tokens", "surprise"))
            assert (found["seeds_low"], found["seeds_high"]) == pytest.approx(ends, rel=1e-4, abs=1e-9)
            assert found["low"] <= found["mean"] <= found["high"]
            length = {"preference_accuracy": PAIRS, "distinct_1": 3, "distinct_2": 3}.get(name, PROMPTS)
            assert found["n"] == length
        kl = [
            plain.mean(values)
            for values in zip(*(results["runs"][r]["kl"] for r in model["names"].values()), strict=True)
        ]
        assert model["kl"]["standard_error"] == pytest.approx(plain.stdev(kl) / math.sqrt(PROMPTS))


def test_the_rates_and_the_choice_of_beta_can_be_computed_again(results):
    by_label = {model["label"]: model for model in results["models"]}
    for pair in results["against_start"]:
        one, other = (list(by_label[pair[side]]["names"].values()) for side in ("one", "other"))
        judged = [[results["runs"][run]["judge"] for run in pairs] for pairs in zip(one, other, strict=True)]
        rates = [win_rate(*both) for both in judged]
        assert pair["win_rate"]["by_seed"] == pytest.approx(rates)
        ties = plain.mean(plain.mean(float(a == b) for a, b in zip(*both, strict=True)) for both in judged)
        assert pair["ties"]["mean"] == pytest.approx(ties)
        gap = plain.mean(plain.mean(both[0]) - plain.mean(both[1]) for both in judged)
        assert pair["difference"]["mean"] == pytest.approx(gap)
    # The beta is chosen by every second prompt, and what is said of the chosen ones is said of the others.
    [duel] = results["duels"]
    for side, kind in (("one", "dpo"), ("other", "ppo")):
        models = [model for model in results["models"] if model["algorithm"] == kind]
        even = {
            model["label"]: plain.mean(
                plain.mean(results["runs"][run]["judge"][::2]) for run in model["names"].values()
            )
            for model in models
        }
        assert duel[side] == max(even, key=even.get)
    judged = [
        [results["runs"][by_label[duel[side]]["names"][str(seed)]]["judge"][1::2] for side in ("one", "other")]
        for seed in duel["seeds"]
    ]
    assert duel["win_rate"]["by_seed"] == pytest.approx([win_rate(*both) for both in judged])
    assert duel["win_rate"]["n"] == PROMPTS // 2


def test_the_costs_can_be_computed_again(results):
    costs = {model["label"]: model["cost"] for model in results["models"]}
    assert costs["SFT"] is None
    assert costs["DPO, beta 0.1"] == cost(60.0, 1408)
    assert costs["PPO, beta 0.1"] == cost(
        250.0, 1408, tokens=2000.0
    )  # with the reward model, whose pairs are no samples


def test_one_seed_has_no_interval_over_seeds():
    model = compared(seeds=(0,), betas=("0.1",))["models"][1]
    assert model["judge"]["seeds_low"] is None
    assert model["judge"]["seeds_high"] is None


def test_intervals_of_shares_end_at_0_and_at_1():
    """Three seeds that disagree: the t interval of their mean would go from -0.5 to 1.2."""
    seeds = [[np.repeat([1.0, 0.0], [ones, 10 - ones])] for ones in (0, 3, 8)]
    for share, low, high in ((False, -0.637, 1.371), (True, 0.0, 1.0)):
        found = estimates.estimate(estimates.mean, seeds, share=share)
        assert (found["seeds_low"], found["seeds_high"]) == pytest.approx((low, high), abs=2e-3)
    results = compared(betas=("0.1",), seeds=(0, 1), dpo=0.3, ppo=0.97)
    rows = results["models"] + results["duels"] + results["against_start"]
    shares = [row[key] for row in rows for key in SHARES & {*row}]
    ends = [each[key] for each in shares for key in ("low", "high", "seeds_low", "seeds_high")]
    assert len(ends) == 4 * (3 * 5 + 3 * 3)
    assert {0.0, 1.0} < {*ends}, "some would have passed the end"
    assert all(0 <= end <= 1 for end in ends)


def test_the_bootstrap_interval_is_as_wide_as_theory_says():
    """Of a mean: 1.96 standard errors to each side, within a few per cent, and paired over seeds."""
    draw = np.random.default_rng(0)
    one = draw.normal(size=400)
    estimate = partial(estimates.estimate, estimates.mean, resamples=estimates.RESAMPLES)
    found = estimate([[one]])
    expected = 1.96 * one.std() / 20
    assert found["high"] - found["mean"] == pytest.approx(expected, rel=0.12)
    assert found["mean"] - found["low"] == pytest.approx(expected, rel=0.12)
    twice = estimate([[one], [one]])  # the same prompts: a second copy adds nothing
    assert twice["high"] - twice["low"] == pytest.approx(found["high"] - found["low"])
    against = estimate([[one], [-one]])  # resampled together: they cancel
    assert (against["low"], against["high"]) == (pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12))


def test_ties_count_one_half():
    rates = estimates.wins(np.array([1.0, 0.5, 0.2]), np.array([0.5, 0.5, 0.4]))
    assert rates.tolist() == [1.0, 0.5, 0.0]


def test_the_length_controlled_rate_is_the_regressions_at_equal_length():
    draw = np.random.default_rng(0)
    longer = draw.normal(10, 10, 4000)
    chance = 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(longer / longer.std()))))
    won = (draw.uniform(size=4000) < chance).astype(float)
    found = estimates.length_controlled(won, longer)
    assert won.mean() > 0.7  # most of it is length
    assert found == pytest.approx(1 / (1 + math.exp(-0.4)), abs=0.03)
    won[:500] = 0.5

    def loss(weights):  # L2 on the slope alone, as strong for each prompt as scikit-learn's is for one of 805
        logit = weights[0] + weights[1] * np.tanh(longer / longer.std())
        penalty = weights[1] ** 2 / 2 * 4000 / 805
        return (won * np.logaddexp(0, -logit) + (1 - won) * np.logaddexp(0, logit)).sum() + penalty

    best = minimize(loss, np.zeros(2)).x
    assert estimates.length_controlled(won, longer) == pytest.approx(1 / (1 + math.exp(-best[0])), abs=1e-3)
    assert estimates.length_controlled(won, np.zeros(4000)) == pytest.approx(won.mean())
    assert estimates.length_controlled(np.ones(9), np.arange(9.0)) == 1.0


def test_distinct_and_repetition_by_hand():
    assert estimates.repetition("a b c d a b c d") == pytest.approx(1 - 4 / 5)  # 5 4-grams, abcd twice
    assert estimates.repetition("a b") == 0.0
    shares = estimates.distinct(["a b a", "a b"] * 15, 1)
    assert shares.tolist() == pytest.approx([2 / 50, 2 / 25])  # groups of 20 and of 10 answers
    assert estimates.distinct(["a b a"], 2).tolist() == [1.0]


NULL = json.loads((Path(__file__).parents[1] / "fixtures" / "null_answers.json").read_text())


REWARDS = np.array([[int(digit) / 4 for digit in row] for row in NULL["rewards"]])


def reported_alike(pairs_of_seeds):
    """The share of comparisons of one model with itself that name no winner."""
    said = []
    for pairs in pairs_of_seeds:
        won = [[estimates.wins(REWARDS[one], REWARDS[other])] for one, other in pairs]
        said.append(estimates.is_noise(estimates.estimate(estimates.mean, won, resamples=400)))
    return plain.mean(said)


def test_p_values_are_those_of_the_intervals_and_holm_corrects_them_for_their_number():
    draw = np.random.default_rng(0)
    for shift in (0.4, 0.45, 0.5, 0.55, 0.62):
        won = [[(draw.uniform(size=150) < shift).astype(float)] for _ in range(3)]
        found = estimates.estimate(estimates.mean, won, resamples=1000, nothing=0.5)
        assert (found["p_value"] >= 0.05) == estimates.is_noise(found), found
    one = estimates.estimate(estimates.mean, [[np.repeat([1.0, 0.0], [60, 40])]], resamples=1000, nothing=0.5)
    assert one["p_value"] == pytest.approx(0.046, abs=0.02)  # a normal's, at two standard errors
    assert estimates.holm([0.02, 0.01, 0.03, 0.5]) == pytest.approx([0.06, 0.04, 0.06, 0.5])  # by hand
    assert estimates.holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert estimates.holm([]) == []


def test_contenders_are_ranked_only_where_holms_correction_allows_it():
    results = compared(betas=("0.1",), dpo=0.3, rounds=0.8, ppo=0.8, seeds=(0,))
    labels = ["DPO, beta 0.1", "DPO in rounds, beta 0.1", "PPO, beta 0.1"]
    assert [(duel["one"], duel["other"]) for duel in results["duels"]] == [*itertools.combinations(labels, 2)]
    ranking = results["verdict"][1]
    assert "DPO in rounds over DPO; PPO over DPO." in ranking
    assert "Not told apart: " in ranking
    assert "All 3 pairs were compared, at 95 % with Holm's correction" in ranking
    assert results["verdict"][0] == "No clear winner"
    assert results["verdict"][2].startswith("Against the reference model: ")
    assert len(results["verdict"]) == 6, "a paragraph for each pair comes last"
    p_values = [duel["win_rate"]["p_value"] for duel in results["duels"]]
    assert [duel["p_value"] for duel in results["duels"]] == pytest.approx(estimates.holm(p_values))
    assert max(p_values) > 0.05 > min(p_values)


@pytest.mark.slow
def test_two_copies_of_one_model_are_reported_as_no_different():
    """The exact rewards of one SFT model's answers to 200 prompts, sampled by 40 seeds.

    One seed each, every other pair of samplings: 19 in 20 is what a 95 % interval promises, and 20 pairs would not
    tell. Three seeds each, as by default: either interval may hold one half, so that fewer go wrong.
    """
    assert REWARDS.shape == (40, 200)
    assert reported_alike([[pair] for pair in [*itertools.combinations(range(40), 2)][::2]]) >= 0.95
    draw = np.random.default_rng(0)
    triples = [draw.permutation(40)[:6].reshape(3, 2).tolist() for _ in range(200)]
    assert reported_alike(triples) >= 0.97


def test_a_better_model_is_not_reported_as_no_different():
    """The same answers, three in ten mended: what the test above passes must be able to fail."""
    better = REWARDS.copy()
    draw = np.random.default_rng(0)
    better[draw.uniform(size=better.shape) < 0.3] = 1.0
    found = [
        estimates.estimate(estimates.mean, [[estimates.wins(better[2 * n], REWARDS[2 * n + 1])]], resamples=400)
        for n in range(20)
    ]
    assert sum(not estimates.is_noise(each) and each["mean"] > 0.5 for each in found) >= 15
    three = [[estimates.wins(better[2 * n], REWARDS[2 * n + 1])] for n in range(20)]
    assert not estimates.is_noise(estimates.estimate(estimates.mean, three))


def test_the_verdict_names_the_winner_by_how_much_and_at_what_cost():
    headline, words, against_start = compared(betas=("0.1",), dpo=0.4, ppo=0.9)["verdict"]
    assert words.startswith("PPO, beta 0.1 won against DPO, beta 0.1: the judge prefers its answer to ")
    numbers = re.search(r"to (\d+) % of 60 prompts.*?interval (\d+) % to (\d+) % over prompts", words).groups()
    share, low, high = map(int, numbers)
    assert 50 < low <= share <= high <= 100
    lead = int(re.fullmatch(r"PPO, by (\d+) points of win rate", headline)[1])
    assert abs(lead - (share - (100 - share))) <= 1  # both are rounded
    assert f", a lead of {lead} points. At equal length" in words
    assert re.search(r", \d+ % to \d+ % over 3 seeds; p = 0\.\d+ after Holm's correction\)", words)
    reward = r"At temperature 0.6 the judge's reward is 0\.\d+ for DPO, beta 0.1 and 0\.\d+ for PPO, beta 0.1, "
    apart = r"more than noise apart, at a KL to the reference model of 3\.\d and 3\.\d nats\."
    assert re.search(reward + apart, words)
    assert "Training took 60 s and 4.2 min a seed, reward models included." in words
    assert re.fullmatch(r"Against the reference model: DPO, beta 0.1 \d+ %; PPO, beta 0.1 \d+ % .*", against_start)
    headline, turned, _ = compared(betas=("0.1",), dpo=0.9, ppo=0.4)["verdict"]
    assert headline.startswith("DPO, by ")
    assert turned.startswith("DPO, beta 0.1 won against PPO, beta 0.1")


def test_the_verdict_says_when_it_is_noise():
    headline, words, _ = compared(betas=("0.1",), dpo=0.6, ppo=0.6)["verdict"]
    assert headline == "No clear winner"
    assert words.startswith("Neither won: DPO, beta 0.1 is no better than noise against PPO, beta 0.1")
    assert "a lead of" not in words


@pytest.mark.slow
def test_the_headline_names_a_winner_only_if_it_won_against_every_rival():
    results = compared(betas=("0.1",), dpo=0.3, ppo=0.9, rloo=0.6)
    pairs = [(duel["one"], duel["other"]) for duel in results["duels"]]
    assert pairs == [
        ("DPO, beta 0.1", "PPO, beta 0.1"),
        ("DPO, beta 0.1", "RLOO, beta 0.1"),
        ("PPO, beta 0.1", "RLOO, beta 0.1"),
    ]
    least = 200 * results["duels"][2]["win_rate"]["mean"] - 100
    assert results["verdict"][0] == f"PPO, by {least:.0f} points of win rate"
    assert compared(betas=("0.1",), dpo=0.3, ppo=0.8, rloo=0.8)["verdict"][0] == "No clear winner"


def test_prompts_alone_do_not_make_a_winner_where_the_seeds_disagree():
    found = {"low": 0.55, "high": 0.65, "seeds_low": 0.45, "seeds_high": 0.75}
    assert estimates.is_noise(found)
    assert not estimates.is_noise(found | {"seeds_low": 0.51})
    assert estimates.is_noise(found | {"seeds_low": None, "seeds_high": None, "low": 0.5})
    assert not estimates.is_noise(found | {"seeds_low": None, "seeds_high": None})


def test_one_seed_failures_and_an_unequal_match_are_told_first():
    unequal = "All learned from the same prompts, except ppo-0.1-0."
    failed = ["ppo-0.1-1 (exit 1)"]
    words = compared(betas=("0.1",), seeds=(0,), dpo=0.3, ppo=0.9, failed=failed, unequal=[unequal])["verdict"]
    assert re.fullmatch(r"With reservations: PPO, by \d+ points of win rate", words[0])
    assert words[1] == "This is a part of the comparison, as some stages failed: ppo-0.1-1 (exit 1)."
    assert words[2] == f"Not an equal match: {unequal}"
    assert "one seed, so that another training might say otherwise" in words[3]


def test_what_failed_leaves_a_comparison_over_the_seeds_that_both_have():
    results = compared(betas=("0.1",), without=["ppo-0.1-1"])
    assert results["duels"][0]["seeds"] == [0, 2]
    gone = compared(betas=("0.1",), without=[f"ppo-0.1-{seed}" for seed in SEEDS], failed=["ppo-0.1-0 (exit 1)"])
    assert not gone["duels"]
    assert gone["verdict"][0].startswith("With reservations: DPO, by ")
    assert gone["verdict"][2].startswith("DPO, beta 0.1 won against SFT")


class Reader(HTMLParser):
    """The text of a page, and what in it a browser would fetch or run."""

    def __init__(self):
        super().__init__()
        self.text, self.active, self.inside = [], [], []

    def handle_starttag(self, tag, attrs):
        self.inside.append(tag)
        for name, value in attrs:
            if name.startswith("on") or (name in ("src", "href") and not value.startswith("data:")):
                self.active.append((tag, name, value))
        if tag in ("script", "iframe", "object", "embed", "form"):
            self.active.append((tag, None, None))

    def handle_data(self, data):
        if "style" not in self.inside[-1:]:
            self.text.append(data)


@pytest.fixture(scope="module")
def report(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    paths = write_report(folder, results)
    return folder, [path.name for path in paths]


def test_the_report_is_one_page_that_fetches_and_runs_nothing(report):
    folder, names = report
    assert names == ["report.html", "report.md", "reward_kl.svg", "two_rewards.svg"]
    text = (folder / "report.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.active == []
    assert text.count('<svg class="frontier"') == 2
    assert html.unescape(HOSTILE) in "".join(reader.text)
    assert "http" not in text.replace("http-equiv", "")


def test_the_page_shows_every_number_with_its_interval_and_n(report, results):
    folder, _ = report
    reader = Reader()
    reader.feed((folder / "report.html").read_text())
    text = " ".join("".join(reader.text).split())
    markdown = (folder / "report.md").read_text()
    for model in results["models"]:
        for name, (label, places, _) in MEASURES.items():
            found = model[name]
            mean, low, high = (
                f"{found[key]:,.{places}f}".replace("-", "\N{MINUS SIGN}") for key in ("mean", "low", "high")
            )
            assert f"{mean} [{low}, {high}]" in text, (model["label"], label)
            assert f"{mean} [{low}, {high}]" in markdown
            assert f"n = {found['n']}" in text
            assert re.search(rf"^\| {label}(, at temperature 0.6)?, n = {found['n']} \|", markdown, re.MULTILINE)
    for paragraph in results["verdict"]:
        assert paragraph in text
        assert paragraph in markdown
    assert markdown.startswith(f"# {results['verdict'][0]}\n")
    assert "60 s" in text
    assert "4.2 min" in text
    assert "reward-0 0.912 [0.880, 0.940]" in text
    for check in results["fairness"]:
        assert check["detail"] in text


SVG = "{http://www.w3.org/2000/svg}"


def parts_of(svg, kind):
    return [part for part in svg.iter() if part.tag.removeprefix(SVG) == kind]


def test_the_plots_have_a_mark_for_every_run_where_its_numbers_are(report, results):
    """The ticks say where a number is: a mark's place, read by them, is the mean of its run."""
    folder, _ = report
    for name, across in (("reward_kl.svg", "kl"), ("two_rewards.svg", "reward_model")):
        svg = ElementTree.parse(folder / name).getroot()
        numbers = [part for part in parts_of(svg, "text") if re.fullmatch(rf"{MINUS}?[\d.]+", part.text or "")]
        at = [
            (part.get("text-anchor"), float(part.text.replace(MINUS, "-")), float(part.get(axis)[:-1]))
            for axis, anchor in (("x", "middle"), ("y", "end"))
            for part in numbers
            if part.get("text-anchor") == anchor
        ]
        on_x, on_y = ([one for one in at if one[0] == anchor] for anchor in ("middle", "end"))
        assert min(len(on_x), len(on_y)) >= 3
        to_x, to_y = (
            np.polynomial.Polynomial.fit([place for *_, place in one], [number for _, number, _ in one], 1)
            for one in (on_x, on_y)
        )
        marks = [part for part in parts_of(svg, "svg") if "0.5" in part[0].get("transform", "") and part.get("class")]
        found = [(to_x(float(part.get("x")[:-1])), to_y(float(part.get("y")[:-1]))) for part in marks]
        runs = [results["runs"][run] for model in results["models"] for run in model["names"].values()]
        expected = [(plain.mean(run[across]), plain.mean(run["judge"])) for run in runs]
        assert len(found) == len(runs) == 3 + 2 * 2 * 3
        assert np.array(found) == pytest.approx(np.array(expected), abs=2e-3)


def read_bars(page):
    """For each measure its heading, the numbers on its axis, and for each bar its parts: (from, to) in per cent."""
    text = page.read_text()
    for block in re.findall(r'<div class="bars".*?(?=<div class="bars"|</section>)', text, re.DOTALL):
        heading = re.sub(r"<.*?>", "", re.search(r"<h3>(.*?)</h3>", block)[1])
        *rows, last = block.split('<div class="rule')[1:]
        axis = [float(number.replace(MINUS, "-")) for number in re.findall(rf"%\">([{MINUS}\d.]+)</span>", last)]
        bars = []
        for row in rows:
            boxes = re.findall(r'<rect class="(\w+)" x="(.*?)%" width="(.*?)%"', row)
            bar = {kind: (float(x), float(x) + float(width)) for kind, x, width in boxes}
            colour = re.search(r"--c: (#\w+)", row)[1]
            bars.append(bar | {"mark": float(re.search(r'<svg class="mark" x="(.*?)%"', row)[1]), "colour": colour})
        yield html.unescape(heading), axis, bars


def test_all_bars_of_a_measure_have_one_stated_scale_with_ticks(report, results):
    folder, _ = report
    blocks = [*read_bars(folder / "report.html")]
    rates = ["win_rate", "length_controlled", "ties", "difference"]
    rows = [results["duels"]] * 4 + [results["models"]] * len(MEASURES) + [results["against_start"]] * 4
    for key, of, (heading, axis, bars) in zip([*rates, *MEASURES, *rates], rows, blocks, strict=True):
        stated = f"on one scale from {axis[0]:g} to {axis[-1]:g}".replace("-", MINUS)
        assert stated in heading, heading
        assert len(axis) >= 3
        assert np.ptp(np.diff(axis)) < 1e-9, "ticks at equal distances"
        assert axis[0] <= 0 <= axis[-1]
        if key in SHARES:
            assert (axis[0], axis[-1]) == (0, 1)
        place = np.polynomial.Polynomial.fit([axis[0], axis[-1]], [0, 100], 1)
        for found, bar in zip((row[key] for row in of), bars, strict=True):
            assert bar["mark"] == pytest.approx(place(found["mean"]), abs=0.02)
            assert bar["interval"] == pytest.approx((place(found["low"]), place(found["high"])), abs=0.03)
            assert bar["seeds"] == pytest.approx((place(found["seeds_low"]), place(found["seeds_high"])), abs=0.03)
            assert all(-0.03 <= end <= 100.03 for kind in ("length", "interval", "seeds") for end in bar[kind])


def test_a_scale_has_round_numbers_around_all_finite_values():
    assert scale([0.45, 0.83]) == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert scale([-0.38, 3.31, math.inf, math.nan]) == [-1, 0, 1, 2, 3, 4]
    assert min(len(scale([0.0, 0.0])), len(scale([math.nan]))) > 1


def test_a_contender_has_one_colour_and_one_marker_everywhere(report, results):
    folder, _ = report
    text, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for model in results["models"]:
        marker, colour = LOOKS[model["algorithm"]]
        beside = re.findall(rf'<i style="color: (#\w+)" aria-hidden="true">(.)</i> {model["label"]}</span>', text)
        assert len(beside) >= len(MEASURES) + 4 * (model["algorithm"] != "sft")
        assert {*beside} == {(colour, marker)}
        assert f"| {marker} {model['label']} |" in markdown
    for _, _, bars in read_bars(folder / "report.html"):
        if len(bars) == len(results["models"]):
            assert [bar["colour"] for bar in bars] == [LOOKS[model["algorithm"]][1] for model in results["models"]]
    drawn = re.findall(r'<path d="(.*?)" style="fill: (#\w+)"', text + (folder / "reward_kl.svg").read_text())
    assert {len({shape for shape, fill in drawn if fill == colour}) for _, colour in LOOKS.values()} == {0, 1}
    assert len({shape for shape, _ in drawn}) == len({fill for _, fill in drawn}) == 3


def test_contenders_can_be_told_apart_without_seeing_red_green_or_blue():
    """Colours as Machado et al. (2009) simulate dichromacy; their distance in CIELAB, and contrast on both grounds."""
    seen_as = {
        "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    }
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

    def linear(colour):
        shares = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
        return np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)

    def lab(light):
        x, y, z = np.cbrt(to_xyz @ np.clip(light, 0, 1) / (0.9505, 1, 1.089))
        return np.array([116 * y, 500 * (x - y), 200 * (y - z)])

    assert {*LOOKS} == {*made.NAMES}
    assert len({marker for marker, _ in LOOKS.values()}) == len(LOOKS)
    for _, colour in LOOKS.values():
        for ground in ("#ffffff", "#1c2027"):
            dark, light = sorted(0.05 + (to_xyz @ linear(each))[1] for each in (colour, ground))
            assert light / dark > 3, (colour, ground)
    for (_, one), (_, other) in itertools.combinations(LOOKS.values(), 2):
        for name, matrix in seen_as.items():
            assert np.linalg.norm(lab(matrix @ linear(one)) - lab(matrix @ linear(other))) > 12, (one, other, name)


def test_the_temperature_stands_beside_every_reward(report):
    folder, _ = report
    reader = Reader()
    reader.feed((folder / "report.html").read_text())
    texts = [" ".join("".join(reader.text).split()), (folder / "report.md").read_text()]
    for text in texts:
        for label in ("judge's reward", "reward model's score"):
            assert f"{label}, at temperature 0.6" in text
            others = re.findall(rf"(.{{0,40}}){label}(?!, at temperature 0.6)(.{{0,60}})", text, re.IGNORECASE)
            assert all("At temperature 0.6" in before or after.startswith(", and ") for before, after in others), others
    assert texts[0].count("difference in the judge's reward, at temperature 0.6") == 2
    assert texts[0].count("reward 0.500 at temperature 0.6") == 1
    assert "(reward 0.500, at temperature 0.6)" in texts[1]
    for name in ("reward_kl.svg", "two_rewards.svg"):
        assert (folder / name).read_text().count("at temperature 0.6") == 2


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """The page of a comparison whose models lie on one point, almost, and whose winner is named."""
    folder = tmp_path_factory.mktemp("crowded")
    results = compared(betas=("0.01", "0.05", "0.1", "0.3"), dpo=0.9, ppo=0.9, rloo=0.9)
    results["verdict"] = ["RLOO, by 12 points of win rate", *results["verdict"][1:]]
    write_report(folder, results)
    return folder


@pytest.mark.parametrize("width", [390, 1280])
def test_labels_of_a_plot_do_not_overlap_and_nothing_is_cut(crowded, width):
    page = seen(crowded / "report.html", width)
    assert page["width"] == width
    assert page["cut"] == []
    assert page["headline"] == "RLOO, by 12 points of win rate"
    assert page["lines"] == 1
    assert len(page["plots"]) == 2
    for (left, top, right, bottom, _), *texts in page["plots"]:
        assert sum("0.05" in words for *_, words in texts) >= 3
        for box in texts:
            assert left - 0.5 <= box[0] < box[2] <= right + 0.5, box
            assert top - 2 <= box[1] < box[3] <= bottom + 2, box
        for one, other in itertools.combinations(texts, 2):
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] + 1 or other[3] <= one[1] + 1
            assert apart, (one, other)


def test_without_a_reward_model_or_a_second_seed_the_report_is_silent_about_them(tmp_path):
    results = compared(betas=("0.1",), seeds=(0,), without=["ppo-0.1-0"])
    for run in results["runs"].values():
        run["reward_model"] = None
    stages = [stage("dpo", "dpo-0.1-0", beta="0.1", seed=0)]
    results |= json.loads(json.dumps(made.collect(stages, results["runs"], results["costs"], betas=["0.1"])))
    names = [path.name for path in write_report(tmp_path, results)]
    assert names == ["report.html", "report.md", "reward_kl.svg"]
    assert "reward model's score" not in (tmp_path / "report.md").read_text()
    assert not re.search(
        r"interval over (1 )?seed", (tmp_path / "report.md").read_text() + (tmp_path / "report.html").read_text()
    )
