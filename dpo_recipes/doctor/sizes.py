"""Configurations of the models that the doctor can time, by name."""

from typing import Any

_QWEN: dict[str, Any] = dict(model_type="qwen2", max_position_embeddings=32_768, use_sliding_window=False)
_FIELDS = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
_FIELDS += ["vocab_size", "tie_word_embeddings"]
_SHAPES = {  # values of _FIELDS
    "tiny": (128, 512, 4, 4, 2, 4096, True),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151_936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151_936, True),
    "qwen2.5-7b": (3584, 18_944, 28, 28, 4, 152_064, False),
}
SIZES = {name: _QWEN | dict(zip(_FIELDS, shape, strict=True)) for name, shape in _SHAPES.items()}
