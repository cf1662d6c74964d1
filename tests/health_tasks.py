"""A model that answers in a dozen words, taught within seconds: what goes wrong with it goes wrong for a reason."""

import random

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

THINGS = [f"thing{number}" for number in range(12)]
WORDS = ["<pad>", "<eos>", "ask", "answer", "is", "good", "bad", "fine", "poor", "really", "very", "so", "junk", *THINGS]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}answer {% generation %}{{ m['content'] }} {{ eos_token }}"
    "{% endgeneration %}{% else %}ask {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}answer {% endif %}"
)
MACHINE = dict(use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", disable_tqdm=True)
SMALL = dict(per_device_train_batch_size=16, logging_steps=1, lr_scheduler_type="constant", save_strategy="no")


def turn(role, content):
    return [{"role": role, "content": content}]


def answer(thing, good, rng, *, length=None):
    """`thing3 is very so good fine`: some words in between, and two that judge it."""
    fill = rng.choices(["really", "very", "so"], k=rng.randint(1, 5) if length is None else length)
    return " ".join([thing, "is", *fill, *(["good", "fine"] if good else ["bad", "poor"])])


def write_pairs(count, *, seed=0, chosen=None, rejected=None):
    """Pairs of a good and a bad answer of like length; `chosen` and `rejected` make others of (thing, rng)."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        thing = rng.choice(THINGS)
        sides = [
            (make or (lambda thing, rng, good=good: answer(thing, good, rng)))(thing, rng)
            for make, good in ((chosen, True), (rejected, False))
        ]
        prompt = " ".join([*rng.choices(["really", "very", "so"], k=rng.randint(0, 6)), thing])
        rows.append({"prompt": turn("user", prompt), **{
            side: turn("assistant", text) for side, text in zip(("chosen", "rejected"), sides, strict=True)}})
    return Dataset.from_list(rows)


def teach(folder):
    """The folder of a model that gives good and bad answers by halves."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    tokens = dict(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, bos_token_id=None)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_key_value_heads=4, max_position_embeddings=128))
    pairs = write_pairs(600)
    rows = Dataset.from_list([{"prompt": pair["prompt"], "completion": pair[side]} for pair in pairs for side in ("chosen", "rejected")])
    args = SFTConfig(output_dir=str(folder / "sft"), max_steps=200, learning_rate=5e-3, **MACHINE, **SMALL)
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(folder))
    return folder


def dpo(start, output_dir, train, *, test=None, model=None, ref_model=None, **settings):
    """A trainer with the taught model as policy and reference."""
    few = dict(max_steps=30, learning_rate=1e-4, eval_strategy="steps", eval_steps=10)
    args = DPOConfig(output_dir=str(output_dir), **MACHINE, **SMALL | few | settings)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start) if model is None else model
    test = write_pairs(64, seed=9) if test is None else test
    return DPOTrainer(model, ref_model, args, train_dataset=train, eval_dataset=test, processing_class=tokenizer)


def reward(start, output_dir, train, *, test=None, **settings):
    few = dict(max_steps=30, learning_rate=1e-3, eval_strategy="steps", eval_steps=10)
    args = RewardConfig(output_dir=str(output_dir), **MACHINE, **SMALL | few | settings)
    test = write_pairs(64, seed=9) if test is None else test
    return RewardTrainer(str(start), args, train_dataset=train, eval_dataset=test, processing_class=PreTrainedTokenizerFast.from_pretrained(start))
