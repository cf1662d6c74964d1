r"""DPO in rounds on Anthropic's helpful and harmless dialogues (hh-rlhf): sample, rank by a reward model, train, again.

Needs: a GPU with 80 GB for Qwen2.5-1.5B (an estimate: 3 GB of frozen bfloat16 weights, the rest activations, and keys
and values while 64 answers are sampled; it has not been measured). A missing reward model is trained first.
docs/rounds.md explains the rounds.

    make train RECIPE=hh-rlhf-rounds
    make train RECIPE=hh-rlhf-rounds ARGS="--reward_model_name_or_path NAME_OF_A_REWARD_MODEL --output_dir outputs/r3"
    make train RECIPE=hh-rlhf-rounds PROFILE=cpu ARGS="--model_name_or_path SMALL --num_prompts 200 \
      --reward_model_name_or_path ITS_JUDGE --max_prompt_length 128 --max_completion_length 128"

Make it yours: `dpo-recipes copy hh-rlhf-rounds`, then change RECIPE, and `load_pairs` for data of your own.
"""

from datasets import DatasetDict
from dpo_recipes.dataset_adapters import hh_rlhf
from dpo_recipes.loading import load_rows, split_pairs
from dpo_recipes.preflight import prepare_pairs, prepare_prompts
from dpo_recipes.presets import LORA
from dpo_recipes.recipe import OnlineArguments, load_tokenizer, parse_recipe, run
from dpo_recipes.rounds import RoundsConfig, begin_rounds, finish_round, load_policy, rank, sample, start_round
from dpo_recipes.runs import finish_run
from dpo_recipes.shared_prefix import SharedPrefixDPOTrainer
from trl import ModelConfig

RECIPE = dict(
    # Data
    dataset_name="Anthropic/hh-rlhf",  # or a file, a folder, NAME:20000 for a sample
    max_length=1024,  # tokens, prompt and completion; oldest turns go first, a completion is never cut
    max_prompt_length=768,  # tokens; oldest turns go first
    max_completion_length=256,  # tokens
    num_prompts=20000,  # of all rounds together, drawn by seed
    # Model
    model_name_or_path="Qwen/Qwen2.5-1.5B-Instruct",
    reward_model_name_or_path="outputs/hh_rlhf_reward",  # made by the recipe of that name
    **LORA,
    # Optimisation
    num_rounds=3,  # each has its own prompts, a new optimizer, and a learning-rate schedule from warm-up to 0
    num_generations=4,  # answers to a prompt; the best and the worst become a pair
    reference="first",  # reference model: the first model in every round; or round, the model a round starts from
    beta=0.1,  # higher stays closer to the reference model
    learning_rate=5e-6,  # LoRA takes about ten times the learning rate of full fine-tuning
    lr_scheduler_type="cosine",
    warmup_steps=0.1,  # share of all updates
    num_train_epochs=1,  # over the pairs of a round
    pairs_per_update=64,  # gradient accumulation follows from it
    per_device_train_batch_size=4,  # pairs; the machine's profile may change it
    adam_beta2=0.95,
    weight_decay=0.0,
    # Bookkeeping
    output_dir="outputs/hh_rlhf_rounds",
    logging_steps=10,  # updates
    eval_strategy="steps",
    eval_steps=100,
    save_steps=100,
    save_total_limit=3,
    report_to="none",  # wandb, trackio, tensorboard
)


def load_pairs(script_args: OnlineArguments) -> DatasetDict:
    """Preference pairs in a train and a test split that share no prompt; the policy answers their prompts."""
    return split_pairs({split: hh_rlhf(rows) for split, rows in load_rows(script_args).items()})


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
    finish_run(trainer, script_args)


if __name__ == "__main__":
    run(main)
