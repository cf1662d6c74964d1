"""TRL's RLOOTrainer (Ahmadian et al. 2024), with updates that can be divided by tokens."""

from typing import Any

import trl
from torch import Tensor

from dpo_recipes.ppo.micro_batches import Shares, divided_logps, divided_loss, refuse_whole, take_budget


class RLOOTrainer(trl.RLOOTrainer):
    """TRL's RLOOTrainer: the same arguments and results.

    With `tokens_per_step`, which `parse_recipe` leaves in the config, an update's answers go through the model in
    micro-batches that hold at most so many tokens. Loss, gradients and metrics are those of the undivided update.

    Raises:
        RecipeError: With `tokens_per_step`, if updates cannot be divided.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        configs = [each for each in (*args, kwargs.get("args")) if isinstance(each, trl.RLOOConfig)]
        self.tokens_per_step = take_budget(configs[0]) if configs else None
        super().__init__(*args, **kwargs)
        if self.tokens_per_step:
            refuse_whole(self)

    def _get_per_token_logps_and_entropies(self, *args: Any, **given: Any) -> Any:
        return divided_logps(self, super()._get_per_token_logps_and_entropies, *args, **given)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss

        def weighted(model: Any, part: dict[str, Any], shares: Shares) -> Tensor:
            mean: Tensor = loss(model, part)
            return mean * shares.answers

        return divided_loss(self, model, inputs, weighted) if self.tokens_per_step else loss(model, inputs)
