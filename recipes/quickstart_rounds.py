"""DPO in rounds on the quickstart: the policy answers, a reward model ranks the answers into pairs, DPO learns, again.

Needs: a CPU and some minutes, after three for `quickstart_sft` and `quickstart_reward`, which are run first. An exact
reward, which training never sees, scores answers before and after training. docs/rounds.md explains the rounds.

    make train RECIPE=quickstart-rounds
    make train RECIPE=quickstart-rounds ARGS="--num_rounds 2 --reference round --output_dir outputs/rounds2"
    make train RECIPE=quickstart-rounds ARGS="--dry_run true"

Make it yours: start from hh-rlhf-rounds instead, which reads a dataset and a real model.
"""

from datasets import DatasetDict
from dpo_recipes import playground
from dpo_recipes.preflight import prepare_pairs, prepare_prompts
from dpo_recipes.presets import LORA
from dpo_recipes.recipe import OnlineArguments, load_tokenizer, parse_recipe, run
from dpo_recipes.rounds import RoundsConfig, begin_rounds, finish_round, load_policy, rank, sample, start_round
from dpo_recipes.runs import finish_run
from dpo_recipes.shared_prefix import SharedPrefixDPOTrainer
from trl import ModelConfig

RECIPE = dict(
    # Data
    dataset_name="playground",
    max_length=256,  # tokens, prompt and completion
    max_prompt_length=128,  # tokens
    max_completion_length=playground.MAX_NEW_TOKENS,  # tokens
    # Model
    model_name_or_path="outputs/quickstart_sft",  # made by the recipe of that name
    reward_model_name_or_path="outputs/quickstart_reward",  # made by the recipe of that name
    **LORA,
    # Optimisation
    num_rounds=3,  # each has its own prompts, a new optimizer, and a learning-rate schedule from warm-up to 0
    num_generations=4,  # answers to a prompt; the best and the worst become a pair
    reference="first",  # reference model: the first model in every round; or round, the model a round starts from
    beta=0.1,  # higher stays closer to the reference model
    loss_type=["sigmoid", "sft"],  # sft keeps the text intact at a learning rate this high
    loss_weights=[1.0, 5.0],
    learning_rate=1.5e-3,  # a model this small takes a high learning rate
    lr_scheduler_type="cosine",
    warmup_steps=0.1,  # share of all updates
    num_train_epochs=2,  # over the pairs of a round
    pairs_per_update=16,  # gradient accumulation follows from it
    per_device_train_batch_size=16,  # pairs; the machine's profile may change it
    adam_beta2=0.95,
    weight_decay=0.0,
    # Bookkeeping
    output_dir="outputs/quickstart_rounds",
    logging_steps=4,  # updates
    eval_strategy="steps",
    eval_steps=12,
    save_steps=12,
    save_total_limit=3,
    report_to="none",  # wandb, trackio, tensorboard
)


def load_pairs(script_args: OnlineArguments) -> DatasetDict:
    """Preference pairs in a train and a test split that share no prompt; the policy answers their prompts."""
    return playground.load_pairs(script_args.dataset_name)


def main() -> None:
    """Parses the arguments, then samples, ranks and trains in rounds, and saves."""
    script_args, training_args, model_args = parse_recipe(RECIPE, (OnlineArguments, RoundsConfig, ModelConfig))
    tokenizer = load_tokenizer(model_args, training_args)
    prompts = prepare_prompts(load_pairs, script_args, training_args, tokenizer)

    for this in begin_rounds(script_args, training_args, prompts["train"]):  # without those that are finished
        policy = load_policy(this, model_args)  # with the LoRA adapter that the last round left
        answers = sample(this, policy, tokenizer)
        ranked = rank(this, answers, script_args.reward_model_name_or_path)
        splits = DatasetDict(train=ranked, test=load_pairs(script_args)["test"])
        pairs = prepare_pairs(lambda _, splits=splits: splits, script_args, this.args, tokenizer)

        trainer = SharedPrefixDPOTrainer(
            model=policy,
            args=this.args,
            train_dataset=pairs["train"],
            eval_dataset=pairs["test"],
            processing_class=tokenizer,
            shared_prefix=script_args.shared_prefix,
        )
        start_round(this, trainer, script_args)
        trainer.train(resume_from_checkpoint=this.args.resume_from_checkpoint)
        finish_round(this, trainer, script_args)
    finish_run(
        trainer,
        script_args,
        strata="faults",  # accuracy by fault of the rejected completion
        score=playground.scores,
        prompts=playground.evaluation_prompts(),
        max_new_tokens=playground.MAX_NEW_TOKENS,
        temperatures=(0.7, 0.0),
    )


if __name__ == "__main__":
    run(main)
