"""LoRA and 4-bit settings as keyword arguments for TRL's ModelConfig.

A preset is spread into a recipe's RECIPE (`**LORA`), so that every value stays a TRL field that a flag can change.
"""

from typing import Any

LORA: dict[str, Any] = dict(
    use_peft=True,
    lora_r=16,  # higher: more capacity, more memory
    lora_alpha=32,  # the update is scaled by alpha / r
    lora_dropout=0.0,  # DPOTrainer switches dropout off in the policy and in the reference model
    lora_target_modules=["all-linear"],  # peft's name for all layers of attention and MLP, without the head
)
"""LoRA on every linear layer; the base model is frozen."""

QLORA: dict[str, Any] = dict(
    **LORA,
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    use_bnb_nested_quant=True,  # also quantises the scales: saves 0.4 bits a weight (Dettmers et al. 2023, section 3)
    dtype="bfloat16",  # the compute dtype of the 4-bit matrix products; trained weights stay float32
)
"""LoRA on a 4-bit base model (Dettmers et al. 2023)."""
