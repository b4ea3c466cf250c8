"""Training metrics of each group: loss, gradient norm, tokens and padding.

`GroupMetrics` collects micro-batches and steps without synchronising with the device. At the end of a step that logs,
`reduce` sums over the ranks, and `take` gives the values to the next training log. Names:

| name | value, over the steps since the last log |
|---|---|
| `loss_<group>` | mean loss of the group's trained tokens, on all ranks and over accumulation |
| `grad_norm_<group>` | mean gradient norm, before clipping, of the steps that hold this group alone |
| `commonit_group` | id of the last step's group (see `groups.json`); -1 for a mixed step or one of several groups |
| `commonit_tokens` | tokens of the data, on all ranks |
| `commonit_padding` | share of the computed tokens that are padding |

Micro-batches of mixed steps count as a group `(mixed)`. Where the loss is no mean over tokens (classifiers,
preferences), `loss_<group>` is the mean over the group's samples of the trainer's own loss of their micro-batch. Tokens
are logged where the batches have them.

Cost: four sums over each micro-batch's tokens, and one reduction of 2 x groups + 2 numbers per log.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.trainer_pt_utils import find_batch_size

IGNORED_LABEL = -100
MIXED_NAME = "(mixed)"


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Tokens of a micro-batch, kept on the device to avoid a synchronisation."""

    trained: torch.Tensor
    """Tokens that the loss counts."""
    data: torch.Tensor
    """Tokens that are not padding."""
    computed: int
    """All tokens."""


def count_tokens(inputs: Mapping[str, Any], shifted: bool = True) -> TokenCounts | None:
    """Count the tokens of a micro-batch; None where it has no tokens or no label per token.

    Args:
        shifted: the first label of a row is not trained, because the loss predicts the next token.
    """
    labels, tokens, mask = inputs.get("labels"), inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(labels, torch.Tensor) or tokens is None or labels.ndim < 2:
        return None
    trained = inputs["shift_labels"] if "shift_labels" in inputs else labels[..., 1:] if shifted else labels
    has_padding = mask is not None and mask.shape == tokens.shape
    return TokenCounts(
        trained=trained.ne(IGNORED_LABEL).sum(),
        data=inputs["attention_mask"].ne(0).sum() if has_padding else torch.tensor(tokens.numel()),
        computed=tokens.numel(),
    )


def count_micro_batch(inputs: Mapping[str, Any], shifted: bool) -> tuple[torch.Tensor, TokenCounts | None]:
    """Return the weight of a micro-batch's loss, its trained tokens or else its samples, and its tokens."""
    tokens = count_tokens(inputs, shifted)
    return torch.tensor(find_batch_size(inputs) or 1) if tokens is None else tokens.trained, tokens


def sum_over_ranks(trainer: Any, values: Any) -> list[float]:
    """Sum a vector over the data-parallel ranks, in double precision where the device has it; a collective."""
    device = trainer.args.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sums = trainer.accelerator.reduce(torch.tensor(values, dtype=dtype, device=device), reduction="sum")
    run = trainer.commonit
    ranks_per_batch = 1 if run is None else trainer.args.world_size / run.spec.world_size  # ranks may share batches
    return (sums / ranks_per_batch).tolist()


class GroupMetrics:
    """Collects metrics of the groups `names` since the last log."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = [*names, MIXED_NAME]  # which the group id -1 takes
        self.clear()

    def clear(self) -> None:
        """Forget everything collected."""
        self._micro_batches: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._tokens: list[TokenCounts] = []
        self._grad_norms: dict[int, list[Any]] = defaultdict(list)
        self._last_group = -1
        self._reduced: dict[str, float] = {}

    def add_micro_batch(
        self, group: int, loss: torch.Tensor, weight: torch.Tensor, tokens: TokenCounts | None = None
    ) -> None:
        """Add a micro-batch of `group`, -1 for several.

        Args:
            loss: sum of the losses of `weight` trained tokens or samples.
            tokens: of the micro-batch; None where it has none.
        """
        self._micro_batches.append((group, loss.detach(), weight))
        if tokens is not None:
            self._tokens.append(tokens)

    def add_step(self, group: int, grad_norm: Any) -> None:
        """Add an optimizer step: its group, -1 for several, and its gradient norm, which may be None."""
        self._last_group = group
        if group >= 0 and grad_norm is not None:
            self._grad_norms[group].append(grad_norm)

    def reduce(self, trainer: Any) -> None:
        """Make the values collected by all ranks of `trainer` ready for `take`, and start anew; a collective."""
        count = len(self.names)
        sums = [0.0] * (2 * count + 2)  # losses of each group, weights of each group, data tokens, computed tokens
        if self._micro_batches:
            groups, losses, weights = zip(*self._micro_batches, strict=True)
            values = zip(groups, torch.stack(losses).tolist(), torch.stack(weights).tolist(), strict=True)
            for group, loss, weight in values:
                sums[group % count] += loss
                sums[count + group % count] += weight
        if self._tokens:
            sums[-2] = sum(torch.stack([counts.data for counts in self._tokens]).tolist())
            sums[-1] = sum(counts.computed for counts in self._tokens)
        *sums, data, computed = sum_over_ranks(trainer, sums)
        logs = {
            f"loss_{name}": loss / weight for name, loss, weight in zip(self.names, sums, sums[count:]) if weight > 0
        }
        for group, norms in sorted(self._grad_norms.items()):
            logs[f"grad_norm_{self.names[group]}"] = sum(map(float, norms)) / len(norms)
        logs["commonit_group"] = self._last_group
        if computed:
            logs |= {"commonit_tokens": data, "commonit_padding": 1 - data / computed}
        self.clear()
        self._reduced = logs

    def take(self) -> dict[str, float]:
        """Return the reduced values once; an empty dict until the next `reduce`."""
        logs, self._reduced = self._reduced, {}
        return logs
