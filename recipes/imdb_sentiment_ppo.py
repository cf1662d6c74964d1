"""PPO with a LoRA adapter on GPT-2-large against a reward model: the DPO paper's sentiment task (section 6.1).

Needs: a GPU with 80 GB (an estimate; it has not been run on one), the model of `imdb_sentiment_sft`, and pairs of that
model's own texts: docs/imdb_sentiment.md has the commands in order. A missing reward model is trained first.

    make train RECIPE=imdb-sentiment-ppo
    make train RECIPE=imdb-sentiment-ppo ARGS="--beta 0.2 --output_dir outputs/ppo_beta02"
    make train RECIPE=imdb-sentiment-ppo ARGS="--reward_model_name_or_path ITS_NAME --output_dir outputs/other_reward"

Make it yours: `dpo-recipes copy imdb-sentiment-ppo`, then change RECIPE, and `load_pairs` for data of your own.
"""

from datasets import DatasetDict
from dpo_recipes.dataset_adapters import plain_text
from dpo_recipes.loading import load_rows, split_pairs
from dpo_recipes.ppo import PPOConfig, PPOTrainer
from dpo_recipes.preflight import prepare_prompts
from dpo_recipes.presets import LORA
from dpo_recipes.recipe import OnlineArguments, load_tokenizer, parse_recipe, run
from dpo_recipes.runs import finish_run, start_run
from trl import ModelConfig, get_peft_config, get_quantization_config

RECIPE = dict(
    # Data
    dataset_name="outputs/imdb_sentiment_pairs.jsonl",  # written by `dpo-recipes sample`: docs/imdb_sentiment.md
    max_prompt_length=64,  # tokens
    max_completion_length=64,  # tokens, as the pairs have
    eval_pairs=128,  # prompts of held-out pairs, answered at every evaluation
    # Model
    model_name_or_path="outputs/imdb_sentiment_sft",  # made by the recipe of that name
    reward_model_name_or_path="outputs/imdb_sentiment_reward",  # made by the recipe of that name
    **LORA,
    # Optimisation
    beta=0.05,  # KL coefficient in the reward; higher stays closer to the reference model
    whiten_advantages=True,  # as Xu et al. 2024 advise
    generation_batch_size=1024,  # answers of a rollout; large, as Xu et al. 2024 advise
    sync_ref_model=False,  # Xu et al. 2024 move the reference model with the policy; TRL refuses that with LoRA
    num_iterations=4,  # epochs over the answers of a rollout
    learning_rate=1e-5,  # LoRA takes about ten times the learning rate of full fine-tuning
    lr_scheduler_type="cosine",
    warmup_steps=0.1,  # share of all updates
    num_train_epochs=1,
    pairs_per_update=128,  # answers; gradient accumulation follows from it
    per_device_train_batch_size=4,  # answers; the machine's profile may change it
    adam_beta2=0.95,
    weight_decay=0.0,
    # Bookkeeping
    output_dir="outputs/imdb_sentiment_ppo",
    logging_steps=10,  # updates
    eval_strategy="steps",
    eval_steps=192,
    save_steps=192,  # a whole number of rollouts, because checkpoints hold no rollout
    save_total_limit=3,
    report_to="none",  # wandb, trackio, tensorboard
)


def load_pairs(script_args: OnlineArguments) -> DatasetDict:
    """Preference pairs in a train and a test split that share no prompt; the policy answers their prompts."""
    return split_pairs({split: plain_text(rows) for split, rows in load_rows(script_args).items()})


def main() -> None:
    """Parses the arguments, loads the data, builds the trainer, trains and saves."""
    script_args, training_args, model_args = parse_recipe(RECIPE, (OnlineArguments, PPOConfig, ModelConfig))
    tokenizer = load_tokenizer(model_args, training_args)
    prompts = prepare_prompts(load_pairs, script_args, training_args, tokenizer)

    trainer = PPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=script_args.reward_model_name_or_path,
        args=training_args,
        train_dataset=prompts["train"],
        eval_dataset=prompts["test"],
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    start_run(trainer, script_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    finish_run(trainer, script_args, max_new_tokens=training_args.max_completion_length)


if __name__ == "__main__":
    run(main)
