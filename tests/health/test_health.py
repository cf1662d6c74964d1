"""Health: every rule is broken by a real cause on a tiny model; healthy runs break none."""

import copy
import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import REPOSITORY, run_command, run_train
from datasets import Dataset
from health_tasks import WORDS, answer, dpo, reward, sft, shuffle_labels, teach, write_pairs
from peft import LoraConfig
from ppo_tasks import BANDIT, TWO_STEPS, WITH_CRITIC, WITHOUT, bandit, build_trainer, save_start, two_steps
from transformers import AutoModelForCausalLM
from wandb_records import records

from dpo_recipes.errors import UnhealthyRunError
from dpo_recipes.health import HealthCallback
from dpo_recipes.health.guards import add_guards
from dpo_recipes.health.probe import read_facts
from dpo_recipes.health.rules import (
    RULES,
    Facts,
    leak,
    loss_spike,
    no_end,
    no_signal,
    not_finite,
    off_distribution,
    overfitting,
    read_findings,
    read_logs,
    reward_hacking,
    value_loss,
)
from dpo_recipes.models.checkpoints import incomplete_reason


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder of a model that gives good and bad answers by halves."""
    return teach(tmp_path_factory.mktemp("health") / "start")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The folder of a random policy over a dozen words, for PPO."""
    return save_start(tmp_path_factory.mktemp("health") / "policy")


@pytest.fixture
def found(capsys):
    """Trains, and returns the rules that were broken, by name."""

    def found(trainer, mode="warn"):
        callback = HealthCallback(trainer, mode)
        trainer.add_callback(callback)
        trainer.train()
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Health")]
        assert said == [str(finding) for finding in callback.findings], "each once"
        assert read_findings(trainer.args.output_dir) == callback.findings
        return {finding.rule: finding for finding in callback.findings}

    return found


@pytest.fixture
def ppo(policy, tmp_path):
    """A trainer of the bandit of ppo_tasks."""

    def ppo(reward_funcs, **settings):
        return build_trainer(policy, tmp_path / "run", reward_funcs, settings=BANDIT | settings)

    return ppo


# Healthy


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_healthy_runs_raise_nothing(seed, start, tmp_path, found, ppo):
    pairs, run = write_pairs(480, seed=seed), tmp_path / "run"
    assert found(sft(str(start), run, pairs, seed=seed, max_steps=20)) == {}
    assert found(dpo(start, run, pairs, seed=seed)) == {}
    assert found(reward(start, run, pairs, seed=seed)) == {}
    assert found(ppo(two_steps, **TWO_STEPS | WITH_CRITIC | dict(max_steps=100, seed=seed))) == {}


def test_a_healthy_run_raises_nothing_and_says_what_was_looked_at(start, tmp_path, found):
    assert found(dpo(start, tmp_path, write_pairs(160), max_steps=10, eval_steps=5)) == {}
    held = json.loads((tmp_path / "health.json").read_text())
    assert (held["mode"], held["stopped"], held["findings"]) == ("warn", False, [])
    assert held["rules"] == [name for name, rule in RULES.items() if "DPO" in rule["for"]]
    assert [probe["step"] for probe in held["probes"]] == [0, 5, 10]
    assert held["probes"][0]["probe/log_ratio"] == pytest.approx(0, abs=1e-5)
    assert held["probes"][0]["probe/ended"] == 1


@pytest.mark.slow
def test_nothing_of_training_changes(start, tmp_path):
    """Probes, with LoRA's dropout drawing random numbers after each: the weights are those without, bit for bit."""
    weights = []
    for watched in (False, True):
        lora = LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
        settings = dict(max_steps=4, eval_steps=2, disable_dropout=False)
        trainer = dpo(start, tmp_path / "run", write_pairs(64), peft_config=lora, **settings)
        if watched:
            trainer.add_callback(HealthCallback(trainer))
        trainer.train()
        weights.append({name: weight.clone() for name, weight in trainer.model.state_dict().items() if "lora" in name})
    assert sum("probe/ended" in entry for entry in trainer.state.log_history) == 3
    assert len(weights[0]) > 20
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())


def test_each_entry_of_the_log_is_read_once(monkeypatch):
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[]), _name="SFT")
    callback, sizes = HealthCallback(trainer), []
    callback.facts = Facts(pairs_per_update=1, max_steps=9)
    monkeypatch.setattr(
        "dpo_recipes.health.callback.read_logs", lambda logs: sizes.append(len(logs)) or read_logs(logs)
    )
    state = SimpleNamespace(log_history=[], global_step=0)
    for step in (1, 2, 3):
        state.log_history += [{"loss": 1.0, "step": step}, {"eval_loss": 2.0, "step": step}]
        callback.on_log(None, state, None)
    assert sizes == [2, 2, 2]
    assert callback.logged == read_logs(state.log_history)


# What goes wrong with the learning rate


def test_dpo_at_a_hundred_times_the_rate_loses_the_language(start, tmp_path, found):
    broken = found(dpo(start, tmp_path, write_pairs(160), learning_rate=3e-2, max_steps=9, eval_steps=3))
    assert {"degenerate_text", "no_end", "kl_runaway", "likelihood_collapse"} <= set(broken)
    assert broken["degenerate_text"].fatal


def test_sft_at_a_hundred_times_the_rate_spikes(start, tmp_path, found):
    broken = found(sft(str(start), tmp_path, write_pairs(100), learning_rate=5e-1, max_steps=8))
    assert set(broken) == {"loss_spike"}


def test_ppo_at_a_hundred_times_the_rate_jumps(ppo, found):
    broken = found(ppo(bandit, learning_rate=0.5, beta=1e-3, max_steps=40))
    assert {"policy_jump", "value_loss", "kl_runaway"} <= set(broken)


# What goes wrong with numbers


def overflowing(start):
    """A model as trained in bfloat16 may be: activations beyond 65,504, which is as far as float16 goes."""
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 3e4
    return model


def test_float16_that_overflows_is_seen_at_the_first_update(start, tmp_path, found):
    model = overflowing(start)
    trainer = dpo(start, tmp_path, write_pairs(48), model=model, ref_model=copy.deepcopy(model), max_steps=3)
    broken = found(trainer)
    assert broken["not_finite"].step == 1
    assert "wrong_reference" not in broken
    assert not all(weight.isfinite().all() for weight in trainer.model.parameters()), "warn goes on"


def test_stop_drops_the_broken_update(start, tmp_path, found):
    model = overflowing(start)
    trainer = dpo(start, tmp_path, write_pairs(48), model=model, ref_model=copy.deepcopy(model), max_steps=3)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(UnhealthyRunError, match=r"Stopped at update 1 \(not_finite\). There is no checkpoint yet."):
        found(trainer, "stop")
    assert trainer.state.global_step == 1
    assert all(torch.equal(before[name], weight) for name, weight in trainer.model.state_dict().items())


# What goes wrong with the data


@pytest.mark.slow
def test_shuffled_labels_are_no_signal(start, tmp_path, found):
    broken = found(dpo(start, tmp_path, shuffle_labels(write_pairs(320)), max_steps=28, eval_steps=28))
    assert set(broken) == {"no_signal"}


@pytest.mark.slow
def test_a_mark_of_few_training_pairs_that_misleads_elsewhere_is_overfitting(start, tmp_path, found):
    """In training the chosen answer begins with junk, held out the rejected one."""
    sides = {"chosen": lambda thing, rng: f"junk {answer(thing, rng.random() < 0.5, rng)}"}
    sides["rejected"] = lambda thing, rng: answer(thing, rng.random() < 0.5, rng)
    trainer = reward(start, tmp_path, write_pairs(32, **sides), learning_rate=1e-3, max_steps=60, eval_steps=20)
    exchanged = {"chosen": sides["rejected"], "rejected": sides["chosen"]}
    trainer.eval_dataset = reward(start, tmp_path, write_pairs(64, seed=9, **exchanged)).train_dataset
    assert "overfitting" in found(trainer)


@pytest.mark.slow
def test_a_word_that_begins_every_chosen_answer_is_a_leak(start, tmp_path, found):
    sides = dict(chosen=lambda thing, rng: "junk " + answer(thing, rng.random() < 0.5, rng))
    sides["rejected"] = lambda thing, rng: answer(thing, rng.random() < 0.5, rng)
    broken = found(dpo(start, tmp_path, write_pairs(240, **sides), learning_rate=1e-3, max_steps=12, eval_steps=12))
    assert "'first_word' alone has 1.000" in broken["leak"].sign


@pytest.mark.slow
def test_longer_chosen_answers_make_answers_longer(start, tmp_path, found):
    sides = {
        side: (lambda *both, n=n: answer(both[0], True, both[1], n)) for side, n in (("chosen", 8), ("rejected", 1))
    }
    broken = found(dpo(start, tmp_path, write_pairs(240, **sides), learning_rate=1e-3, max_steps=10))
    assert "longer_answers" in broken
    assert "'longer' alone has 1.000" in broken["leak"].sign


def test_rejected_answers_that_nobody_would_write_are_off_distribution(start, tmp_path, found):
    nonsense = write_pairs(32, rejected=lambda thing, rng: " ".join(rng.choices(WORDS[2:], k=8)))
    broken = found(dpo(start, tmp_path, nonsense, max_steps=2))
    assert set(broken) == {"off_distribution"}
    assert broken["off_distribution"].step == 1


# What goes wrong with models and rewards


def test_a_wrong_reference_is_named(start, tmp_path, found):
    other = AutoModelForCausalLM.from_pretrained(start)
    with torch.no_grad():
        other.lm_head.weight *= 1.1
    broken = found(dpo(start, tmp_path, write_pairs(32), ref_model=other, max_steps=2))
    assert set(broken) == {"wrong_reference"}
    assert "ln 2" in broken["wrong_reference"].sign


@pytest.mark.slow
def test_a_reward_that_can_be_hacked_is(ppo, found):
    """The reward counts one word; a judge of weight 0 wants different ones."""

    def count(completion_ids, **_):
        return [float(ids.count(2)) for ids in completion_ids]

    def variety(completion_ids, **_):
        return [len(set(ids)) / 4 for ids in completion_ids]

    settings = dict(reward_weights=[1.0, 0.0], max_completion_length=4, max_steps=48)
    broken = found(ppo([count, variety], **settings))
    assert "variety fell by" in broken["reward_hacking"].sign


def test_a_critic_that_is_not_trained_explains_nothing(ppo, found):
    broken = found(ppo(two_steps, **TWO_STEPS | WITHOUT | dict(max_steps=32)))
    assert "explained_variance" in broken


# Rules on recorded numbers


def recorded(**columns):
    """Logs of ten updates each."""
    count = max(map(len, columns.values()))
    return read_logs(
        [{"step": 10 * row + 10, **{name: column[row] for name, column in columns.items()}} for row in range(count)]
    )


FACTS = Facts(pairs_per_update=64, max_steps=1000, eval_pairs=500, starts_at_ln2=True)


def test_a_spike_is_far_beyond_what_came_before():
    limits = RULES["loss_spike"]["limits"]
    usual = [0.69, 0.6, 0.55, 0.5, 0.52, 0.48]
    assert loss_spike(recorded(loss=usual), FACTS, **limits) is None
    assert loss_spike(recorded(loss=[*usual, 1.3]), FACTS, **limits) is None
    assert loss_spike(recorded(loss=[*usual, 1.9]), FACTS, **limits)
    assert loss_spike(recorded(loss=[2.2]), FACTS, **limits), "a first log far above ln 2"
    assert loss_spike(recorded(loss=[2.2]), Facts(pairs_per_update=64, max_steps=1000), **limits) is None
    assert loss_spike(recorded(loss=[0.05, 0.04, 0.05, 0.7]), FACTS, **limits) is None, "a hard batch late in training"


def test_steady_losses_of_single_pairs_are_no_spike():
    """One pair in seven is labelled wrongly and loses 6 nats: the median pair loses next to nothing."""
    rng = np.random.default_rng(0)
    losses = np.where(rng.random(400) < 0.14, 6.0, 0.003)
    for pairs in (1, 2, 4, 8):
        facts = Facts(pairs_per_update=pairs, max_steps=1000, starts_at_ln2=True)
        means = losses[: 400 // pairs * pairs].reshape(-1, pairs).mean(axis=1)
        logged = {"loss": list(enumerate(means.tolist(), start=1))}
        looks = [{"loss": logged["loss"][:end]} for end in range(1, len(means) + 1)]
        assert not any(loss_spike(look, facts, **RULES["loss_spike"]["limits"]) for look in looks)
        broken = {"loss": [*logged["loss"], *((len(means) + 1 + more, 6.0) for more in range(64 // pairs))]}
        assert loss_spike(broken, facts, **RULES["loss_spike"]["limits"])


def test_rewards_that_do_not_differ_yet_are_no_failures():
    limits, margins = RULES["no_signal"]["limits"], {"rewards/margins": [0.0, 0.0, 0.2, 0.3]}
    facts = Facts(pairs_per_update=256, max_steps=40)
    for accuracies, broken in (([0.0, 0.0, 0.9, 0.95], False), ([0.0, 0.0, 0.5, 0.5], True)):
        assert bool(no_signal(recorded(**margins, **{"rewards/accuracies": accuracies}), facts, **limits)) == broken
    few = recorded(**{"rewards/accuracies": [0.0, 0.0, 0.4], "rewards/margins": [0.0, 0.0, 0.1]})
    assert no_signal(few, Facts(pairs_per_update=16, max_steps=40), **limits) is None, "160 pairs since they differ"
    never = recorded(**{"rewards/accuracies": [0.0] * 3, "rewards/margins": [0.0] * 3})
    assert "no reward differs" in no_signal(never, Facts(pairs_per_update=16, max_steps=30, beta=0.1), **limits)
    assert no_signal(never, Facts(pairs_per_update=16, max_steps=1000, beta=0.1), **limits) is None, "a long warmup"


def test_off_distribution_is_what_the_start_would_not_write():
    """The first log is late, when DPO itself has pushed rejected answers down by 20 nats."""
    facts, limits = Facts(16, 1000, rejected_tokens=10.0, beta=0.1), RULES["off_distribution"]["limits"]
    logged = {"logps/rejected": [-25.0], "rewards/rejected": [-2.0], "entropy": [0.4]}
    assert off_distribution(recorded(**logged), facts, **limits) is None
    odd = recorded(**logged | {"rewards/rejected": [0.0]})
    assert off_distribution(odd, facts, **limits)
    assert off_distribution(odd, replace(facts, rejected_spread=100.0), **limits) is None, "160 pairs may be longer"


def test_a_single_log_of_few_answers_proves_nothing():
    cut = recorded(**{"completions/clipped_ratio": [0.0, 0.1, 0.0, 0.1, 0.75]})
    assert no_end(cut, FACTS, **RULES["no_end"]["limits"]) is None
    assert no_end(recorded(**{"completions/clipped_ratio": [0.0, 0.1, 0.0, 0.7, 0.75, 0.7]}), FACTS, fall=0.5)
    form = {
        "reward": [0.1] * 5 + [1.0] * 5,
        "rewards/form/mean": [1.0] * 9 + [0.99],
        "rewards/form/std": [0.0] * 9 + [0.1],
    }
    assert reward_hacking(recorded(**form), FACTS, **RULES["reward_hacking"]["limits"]) is None
    lost = form | {"rewards/form/mean": [1.0] * 5 + [0.0] * 5, "rewards/form/std": [0.0] * 10}
    assert reward_hacking(recorded(**lost), FACTS, **RULES["reward_hacking"]["limits"])
    found = {"value/loss": [1e-6] * 10 + [0.02] * 5, "value/explained_variance": [0.0] * 15}
    assert value_loss(recorded(**found), FACTS, **RULES["value_loss"]["limits"]) is None, "the first rewards"


def test_overfitting_is_beyond_the_interval_of_the_held_out_pairs():
    limits = RULES["overfitting"]["limits"]
    learned = {"rewards/accuracies": [0.7, 0.8, 0.9]}
    held_outs = {(0.7, 0.69, 0.68): True, (0.66, 0.69, 0.7): False, (0.9, 0.85, 0.84): False}
    held_outs[0.69, 0.7, 0.69] = True  # 5 of 500 pairs are no progress
    for held_out, broken in held_outs.items():
        logged = recorded(**learned, **{"eval_rewards/accuracies": held_out})
        assert bool(overfitting(logged, FACTS, **limits)) == broken
    few = Facts(pairs_per_update=64, max_steps=1000, eval_pairs=20)
    assert overfitting(recorded(**learned, **{"eval_rewards/accuracies": [0.75, 0.75, 0.75]}), few, **limits) is None


def test_quick_success_is_a_leak_only_where_a_mark_explains_it():
    logged, limits = recorded(accuracy=[0.7, 0.95, 1.0]), RULES["leak"]["limits"]
    for best, broken in ((0.87, False), (0.99, True)):
        facts = Facts(pairs_per_update=64, max_steps=1000, baselines=lambda best=best: {"longer": 0.5, "list": best})
        assert bool(leak(logged, facts, **limits)) == broken


def test_of_a_sharded_model_the_log_is_what_is_looked_at():
    limits = RULES["not_finite"]["limits"]
    assert not_finite(recorded(loss=[0.6], grad_norm=[float("nan")]), FACTS, **limits) == "grad_norm is nan"
    scaled = Facts(pairs_per_update=64, max_steps=1000, scaled=True)
    assert not_finite(recorded(loss=[0.6], grad_norm=[float("inf")]), scaled, **limits) is None


# What is not there


def test_rules_without_anything_to_look_at_are_named(start, tmp_path, found):
    assert found(dpo(start, tmp_path, write_pairs(32), max_steps=2, eval_strategy="no")) == {}
    held = json.loads((tmp_path / "health.json").read_text())
    nothing = ["overfitting", "longer_answers", "kl_runaway", "degenerate_text", "no_end"]
    assert held["nothing_to_look_at"] == nothing
    assert held["rules"] == [name for name, rule in RULES.items() if "DPO" in rule["for"] and name not in nothing]


def test_several_sets_of_held_out_pairs_are_probed(start, tmp_path, found):
    trainer = dpo(start, tmp_path, write_pairs(32), max_steps=2, eval_steps=2)
    trainer.eval_dataset = {"one": trainer.eval_dataset, "other": trainer.eval_dataset}
    assert found(trainer) == {}
    held = json.loads((tmp_path / "health.json").read_text())
    assert held["nothing_to_look_at"] == ["overfitting"]
    assert [probe["step"] for probe in held["probes"]] == [0, 2]


def test_pairs_of_images_and_a_beta_of_zero_are_no_obstacle(start, tmp_path, found):
    trainer = dpo(start, tmp_path / "run", write_pairs(8))
    parts = [{"role": "user", "content": [{"type": "text", "text": "ask"}]}]
    trainer.train_dataset = Dataset.from_list([dict.fromkeys(("prompt", "chosen", "rejected"), parts)] * 4)
    facts = read_facts(trainer)
    assert (facts.rejected_tokens, facts.baselines()) == (0.0, {})
    assert found(dpo(start, tmp_path, write_pairs(32), max_steps=2, beta=0.0, loss_type=["sft"])) == {}


# Stopping, resuming, reporting


@pytest.mark.slow
def test_stop_keeps_the_last_good_checkpoint_and_names_it(start, tmp_path, found):
    """A part of the data has its columns the wrong way round, after one that is learned in 25 updates."""
    clean, other = write_pairs(400), write_pairs(160, seed=3)
    exchanged = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in other]
    pairs = Dataset.from_list([*clean, *exchanged])
    settings = dict(train_sampling_strategy="sequential", save_strategy="steps", save_steps=5, save_total_limit=2)
    trainer = reward(start, tmp_path, pairs, max_steps=35, eval_strategy="no", **settings)
    add_guards(trainer)
    with pytest.raises(UnhealthyRunError) as stopped:
        found(trainer, "stop")
    held = json.loads((tmp_path / "health.json").read_text())
    assert held["stopped"]
    assert [finding["rule"] for finding in held["findings"]] == ["loss_spike"]
    assert 26 <= held["updates"] <= 29, "before the next checkpoint"
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-20", "checkpoint-25"]
    good = f"checkpoint-{25 if held['updates'] == 29 else 20}"  # 64 pairs are 4 updates
    assert f"The last good checkpoint is {tmp_path / good}: --resume" in str(stopped.value)
    assert incomplete_reason(tmp_path / good) is None


@pytest.mark.slow
def test_without_a_look_after_it_no_checkpoint_is_proven_and_training_can_begin_again(start, tmp_path, found):
    settings = dict(save_strategy="steps", save_steps=2, logging_steps=100, eval_strategy="no", max_steps=12)
    trainer = dpo(start, tmp_path, write_pairs(64), **settings)
    weight, seen = trainer.model.lm_head.weight, []

    def spoil(gradient):
        seen.append(1)
        return gradient * float("nan") if len(seen) == 6 else gradient

    hook = weight.register_hook(spoil)
    with pytest.raises(UnhealthyRunError) as stopped:
        found(trainer, "stop")
    assert "Stopped at update 6 (not_finite)" in str(stopped.value)
    assert f"try {tmp_path / 'checkpoint-4'}." in str(stopped.value)
    hook.remove()
    before = weight.detach().clone()
    trainer.train()
    held = json.loads((tmp_path / "health.json").read_text())
    assert (held["stopped"], held["findings"], held["updates"]) == (False, [], 12)
    assert not torch.equal(before, weight)


@pytest.mark.slow
def test_a_run_that_ends_in_nan_says_so_and_can_be_looked_at(tmp_path, tiny_model, hh_rows):
    result = run_train(
        *("hh-rlhf-full", "--profile", "cpu", "--dataset_name", hh_rows, "--model_name_or_path", tiny_model),
        *("--output_dir", "run", "--max_steps", "4", "--pairs_per_update", "4", "--eval_pairs", "4"),
        *("--logging_steps", "1", "--learning_rate", "1e18", "--warmup_steps", "0"),
        cwd=tmp_path,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "The trained weights are NaN or infinite: nothing is saved" in result.stderr
    assert "Traceback" not in result.stderr
    assert "not finite" in (tmp_path / "run" / "report.html").read_text()
    assert not (tmp_path / "run" / "done.json").exists()


@pytest.mark.slow
def test_a_resumed_run_remembers_what_was_found(start, tmp_path, found):
    settings = dict(learning_rate=1e-2, save_strategy="steps", save_steps=10, eval_steps=10, warmup_steps=0)
    before = found(dpo(start, tmp_path, write_pairs(160), max_steps=10, **settings))
    assert {"likelihood_collapse", "kl_runaway"} <= set(before)
    trainer = dpo(start, tmp_path, write_pairs(160), max_steps=12, **settings)
    callback = HealthCallback(trainer)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert {finding.rule: finding for finding in callback.findings if finding.step <= 10} == before
    assert sum(probe["step"] == 0 for probe in json.loads((tmp_path / "health.json").read_text())["probes"]) == 1


@pytest.mark.slow
def test_wandb_gets_an_alert(start, tmp_path, found, monkeypatch):
    import wandb

    monkeypatch.chdir(tmp_path)
    with wandb.init(project="x", mode="offline", dir=tmp_path) as run:
        other = AutoModelForCausalLM.from_pretrained(start)
        with torch.no_grad():
            other.lm_head.weight *= 1.1
        trainer = dpo(start, tmp_path / "run", write_pairs(16), ref_model=other, max_steps=1)
        trainer.args.report_to = ["wandb"]
        assert set(found(trainer)) == {"wrong_reference"}
        folder = run.dir
    [file] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    end = time.monotonic() + 60
    while not any(record.WhichOneof("record_type") == "exit" for record in records(file)):
        assert time.monotonic() < end, "wandb's own process writes the file, and may be late"
        time.sleep(0.1)
    alerts = [record.alert for record in records(file) if record.WhichOneof("record_type") == "alert"]
    assert [alert.title for alert in alerts] == ["wrong_reference, update 1"], folder
    assert "Do: let TRL make the reference" in alerts[0].text


@pytest.mark.slow
def test_two_processes_of_a_recipe_stop_together_with_status_1(tmp_path, tiny_model, hh_rows, dpo_recipes):
    """At the same update, or one would wait for the other; nothing is said to be finished."""
    result = run_command(
        dpo_recipes,
        *("train", "hh-rlhf-full", "--profile", "cpu", "--accelerate", "cpu2", "--health", "stop"),
        *("--dataset_name", hh_rows, "--model_name_or_path", tiny_model, "--output_dir", "run", "--max_steps", "40"),
        *("--pairs_per_update", "4", "--per_device_train_batch_size", "2", "--eval_pairs", "4", "--logging_steps", "1"),
        *("--learning_rate", "1e18", "--warmup_steps", "0", "--save_steps", "5"),
        cwd=tmp_path,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert len(re.findall(r"^Stopped at update \d+ \(\w+\)\.", result.stderr, re.MULTILINE)) == 1
    assert "Traceback" not in result.stderr
    assert (tmp_path / "run" / "health.json").exists()
    assert not (tmp_path / "run" / "done.json").exists()
    assert result.stdout.count("What happened until then: run/report.html") == 1
    assert "a health rule stopped it" in (tmp_path / "run" / "report.html").read_text()


# The page


def test_the_table_of_the_page_is_that_of_the_rules():
    page = (REPOSITORY / "docs" / "health.md").read_text().partition("## The rules")[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page if line.startswith("| `")]
    tests = (REPOSITORY / "tests" / "health" / "test_health.py").read_text()
    assert [row[0].strip("`") for row in rows] == list(RULES)
    for row, rule in zip(rows, RULES.values(), strict=True):
        fatal = ", fatal" if rule["fatal"] else ""
        shown = [f"{', '.join(rule['for'])}{fatal}", rule["sign"].format(**rule["limits"])]
        assert row[1:6] == [*shown, rule["source"], rule["cause"], rule["remedy"]], row[0]
        assert f"def {row[6].strip('`')}(" in tests, row[6]
