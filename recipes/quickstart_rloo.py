"""RLOO against the quickstart's reward model: samples answers, scores them, and compares answers to the same prompt.

Needs: a CPU and some minutes, after three for `quickstart_sft` and `quickstart_reward`, which are run first. This is
TRL's RLOOTrainer (Ahmadian et al. 2024), not PPO: one advantage an answer, no critic, one update a rollout. An exact
reward, which training never sees, scores answers before and after training.

    make train RECIPE=quickstart-rloo
    make train RECIPE=quickstart-rloo ARGS="--beta 0.2 --output_dir outputs/rloo_beta02"
    make train RECIPE=quickstart-rloo ARGS="--dry_run true"

Make it yours: start from hh-rlhf-rloo instead, which reads a dataset and a real model.
"""

from datasets import DatasetDict
from dpo_recipes import playground
from dpo_recipes.ppo import RLOOTrainer
from dpo_recipes.preflight import prepare_prompts
from dpo_recipes.presets import LORA
from dpo_recipes.recipe import OnlineArguments, load_tokenizer, parse_recipe, run
from dpo_recipes.runs import finish_run, start_run
from trl import ModelConfig, RLOOConfig, get_peft_config, get_quantization_config

RECIPE = dict(
    # Data
    dataset_name="playground",
    max_prompt_length=128,  # tokens
    max_completion_length=playground.MAX_NEW_TOKENS,  # tokens
    eval_pairs=64,  # prompts of held-out pairs, answered at every evaluation
    # Model
    model_name_or_path="outputs/quickstart_sft",  # made by the recipe of that name
    reward_model_name_or_path="outputs/quickstart_reward",  # made by the recipe of that name
    **LORA,
    # Optimisation
    beta=0.05,  # KL coefficient; higher stays closer to the reference model
    num_generations=4,  # answers to a prompt: each is compared with the mean of the others
    num_generations_eval=1,
    generation_batch_size=64,  # answers of a rollout
    learning_rate=1e-3,  # a model this small takes a high learning rate
    lr_scheduler_type="cosine",
    warmup_steps=0.1,  # share of all updates
    num_train_epochs=2,
    pairs_per_update=64,  # answers; gradient accumulation follows from it
    per_device_train_batch_size=16,  # answers; the machine's profile may change it
    adam_beta2=0.95,
    weight_decay=0.0,
    # Bookkeeping
    output_dir="outputs/quickstart_rloo",
    logging_steps=4,  # updates
    eval_strategy="steps",
    eval_steps=28,
    save_steps=28,
    save_total_limit=3,
    report_to="none",  # wandb, trackio, tensorboard
)


def load_pairs(script_args: OnlineArguments) -> DatasetDict:
    """Preference pairs in a train and a test split that share no prompt; the policy answers their prompts."""
    return playground.load_pairs(script_args.dataset_name)


def main() -> None:
    """Parses the arguments, loads the data, builds the trainer, trains and saves."""
    script_args, training_args, model_args = parse_recipe(RECIPE, (OnlineArguments, RLOOConfig, ModelConfig))
    tokenizer = load_tokenizer(model_args, training_args)
    prompts = prepare_prompts(load_pairs, script_args, training_args, tokenizer)

    trainer = RLOOTrainer(
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
    finish_run(
        trainer,
        script_args,
        score=playground.scores,
        prompts=playground.evaluation_prompts(),
        max_new_tokens=playground.MAX_NEW_TOKENS,
        temperatures=(0.7, 0.0),
    )


if __name__ == "__main__":
    run(main)
