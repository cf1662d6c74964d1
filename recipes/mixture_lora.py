"""DPO with a LoRA adapter on a mixture of hh-rlhf, SHP and UltraFeedback.

Needs: a GPU with 24 GB for Qwen2.5-1.5B at 1,024 tokens (an estimate: 3 GB of frozen bfloat16 weights, the rest
activations; it has not been measured on such a card). The first run downloads the model and the three datasets,
and draws samples of them.

    make train RECIPE=mixture-lora
    make train RECIPE=mixture-lora ARGS="--dataset_name mine.jsonl+Anthropic/hh-rlhf:5000 --output_dir outputs/mine"
    make train RECIPE=mixture-lora PROFILE=cpu ARGS="--model_name_or_path SMALL --max_length 256 --max_steps 100"

Make it yours: `dpo-recipes copy mixture-lora`, then change RECIPE, and `load_pairs` for data of your own.
"""

from datasets import DatasetDict
from dpo_recipes.dataset_adapters import hh_rlhf, shp, ultrafeedback_binarized
from dpo_recipes.loading import mix_pairs
from dpo_recipes.preflight import prepare_pairs
from dpo_recipes.presets import LORA
from dpo_recipes.recipe import RecipeArguments, load_tokenizer, parse_recipe, run
from dpo_recipes.runs import finish_run, start_run
from dpo_recipes.shared_prefix import SharedPrefixDPOTrainer
from trl import DPOConfig, ModelConfig, get_peft_config, get_quantization_config

RECIPE = dict(
    # Data
    dataset_name="Anthropic/hh-rlhf:20000+stanfordnlp/SHP:20000+trl-lib/ultrafeedback_binarized:10000",
    max_length=1024,  # tokens, prompt and completion; oldest turns go first, a completion is never cut
    # Model
    model_name_or_path="Qwen/Qwen2.5-1.5B-Instruct",
    **LORA,
    # Optimisation
    beta=0.1,  # higher stays closer to the reference model
    learning_rate=5e-6,  # LoRA takes about ten times the learning rate of full fine-tuning
    lr_scheduler_type="cosine",
    warmup_steps=0.1,  # share of all updates
    num_train_epochs=1,  # a second epoch mostly overfits
    pairs_per_update=64,  # gradient accumulation follows from it
    per_device_train_batch_size=4,  # pairs; the machine's profile may change it
    adam_beta2=0.95,
    weight_decay=0.0,
    # Bookkeeping
    output_dir="outputs/mixture_lora",
    logging_steps=10,  # updates
    eval_strategy="steps",
    eval_steps=200,
    save_steps=200,
    save_total_limit=3,
    report_to="none",  # wandb, trackio, tensorboard
)


def load_pairs(script_args: RecipeArguments) -> DatasetDict:
    """Preference pairs in a train and a test split that share no prompt."""
    dataset_adapters = {  # any other dataset's adapter follows from its columns
        "Anthropic/hh-rlhf": hh_rlhf,
        "stanfordnlp/SHP": shp,
        "trl-lib/ultrafeedback_binarized": ultrafeedback_binarized,
    }
    return mix_pairs(script_args, dataset_adapters)


def main() -> None:
    """Parses the arguments, loads the data, builds the trainer, trains and saves."""
    script_args, training_args, model_args = parse_recipe(RECIPE, (RecipeArguments, DPOConfig, ModelConfig))
    tokenizer = load_tokenizer(model_args, training_args)
    pairs = prepare_pairs(load_pairs, script_args, training_args, tokenizer)

    trainer = SharedPrefixDPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        shared_prefix=script_args.shared_prefix,
    )
    start_run(trainer, script_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    finish_run(trainer, script_args)


if __name__ == "__main__":
    run(main)
