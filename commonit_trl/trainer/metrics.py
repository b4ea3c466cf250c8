"""What training logs besides the Trainer's own: the loss and gradient norm of each group, tokens and padding.

`GroupMetrics` collects each micro-batch and optimizer step between two logs, without waiting for the device; `take`
then sums over ranks and gives the values to log. Names:

| name | value, over the steps since the last log |
|---|---|
| `loss_<group>` | mean loss of the group's trained tokens, on all ranks and over accumulation |
| `grad_norm_<group>` | mean gradient norm, before clipping, of the steps that hold this group alone |
| `commonit_group` | id of the last step's group (see `groups.json`); -1 for a step of several groups |
| `commonit_tokens` | tokens of the data, on all ranks |
| `commonit_padding` | share of the computed tokens that are padding |

Cost: four sums over each micro-batch's tokens, and one reduction of 2 x groups + 2 numbers a log.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Tokens of a micro-batch, as tensors that nobody has waited for."""

    trained: torch.Tensor
    """Tokens that the loss counts."""
    data: torch.Tensor
    """Tokens that are not padding."""
    computed: int
    """All tokens."""


def count_tokens(inputs: Mapping[str, Any]) -> TokenCounts | None:
    """The token counts of a micro-batch; None where it has no labels or tokens."""
    labels, tokens, mask = inputs.get("labels"), inputs.get("input_ids"), inputs.get("attention_mask")
    if labels is None or tokens is None:
        return None
    # As `Trainer._get_num_items_in_batch` counts: the first token of a row has nothing before it to be told from.
    shifted = inputs["shift_labels"] if "shift_labels" in inputs else labels[..., 1:]
    has_padding = mask is not None and mask.shape == tokens.shape
    return TokenCounts(
        trained=shifted.ne(IGNORED_LABEL).sum(),
        data=inputs["attention_mask"].ne(0).sum() if has_padding else torch.tensor(tokens.numel()),
        computed=tokens.numel(),
    )


class GroupMetrics:
    """Collects what is logged of the groups `names` since the last log."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._clear()

    def _clear(self) -> None:
        self._micro_batches: list[tuple[int, torch.Tensor, TokenCounts]] = []
        self._grad_norms: dict[int, list[Any]] = defaultdict(list)
        self._last_group = -1

    def add_micro_batch(self, group: int, loss: torch.Tensor, counts: TokenCounts) -> None:
        """Add a micro-batch of `group`: the sum of its tokens' losses, and how many there are."""
        self._micro_batches.append((group, loss.detach(), counts))

    def add_step(self, group: int, grad_norm: Any) -> None:
        """Add an optimizer step: its group, -1 for several, and its gradient norm, which may be None."""
        self._last_group = group
        if group >= 0 and grad_norm is not None:
            self._grad_norms[group].append(grad_norm)

    def take(self, sum_over_ranks: Callable[[list[float]], list[float]]) -> dict[str, float]:
        """The values to log, and start anew.

        Args:
            sum_over_ranks: the sum of a vector over the data-parallel ranks; called once, on every rank.
        """
        count = len(self.names)
        sums = [0.0] * (2 * count + 2)  # losses of each group, trained tokens of each group, data, computed
        if self._micro_batches:
            groups, losses, tokens = zip(*self._micro_batches, strict=True)
            trained = torch.stack([counts.trained for counts in tokens]).tolist()
            for group, loss, number in zip(groups, torch.stack(losses).tolist(), trained, strict=True):
                sums[group] += loss
                sums[count + group] += number
            sums[-2] = sum(torch.stack([counts.data for counts in tokens]).tolist())
            sums[-1] = sum(counts.computed for counts in tokens)
        *sums, data, computed = sum_over_ranks(sums)
        logs = {
            f"loss_{name}": loss / number for name, loss, number in zip(self.names, sums, sums[count:]) if number > 0
        }
        for group, norms in sorted(self._grad_norms.items()):
            logs[f"grad_norm_{self.names[group]}"] = sum(map(float, norms)) / len(norms)
        logs["commonit_group"] = self._last_group
        logs["commonit_tokens"] = data
        logs["commonit_padding"] = 1 - data / computed if computed else 0.0
        self._clear()
        return logs
