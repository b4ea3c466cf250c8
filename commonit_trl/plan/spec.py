"""Hold everything that determines the micro-batches of a run in one frozen value.

The trainer, `commonit inspect`, Axolotl's bins and a resumed run build a `PlanSpec`; `plan(epoch)` depends on nothing
else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import signature
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from commonit_trl.config import CommonITArguments, nearest
from commonit_trl.plan.epoch import EpochPlan, plan_epoch, plan_remaining

_BY_EPOCH = ("pure_fraction", "heaviest_first", "epoch")
_ARGUMENTS = tuple(name for name in signature(plan_epoch).parameters if name not in _BY_EPOCH)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanSpec:
    """Hold the arguments of `plan_epoch` that stay the same over a run.

    It caches the plan of one epoch, 4 bytes per sample.
    """

    group_ids: NDArray[np.integer[Any]]
    """(samples,) group id of each sample: a row, a pack or a bin."""
    lengths: NDArray[Any] | None = None
    """(samples,) tokens of each sample, by which steps are balanced; None: micro-batches of equal size."""
    micro_batch_size: int
    world_size: int = 1
    accumulation_steps: int = 1
    purity: str = "step"
    remainder: str = "keep"
    pure_fraction: tuple[float, ...] = (1.0,)
    """By epoch; the last one holds for all that follow."""
    order: str = "random"
    positions: NDArray[np.float64] | None = None
    mixed_groups: tuple[int, ...] = ()
    left_out_groups: tuple[int, ...] = ()
    heaviest_first: NDArray[Any] | None = None
    """(samples,) tokens of each sample, by which the heaviest step of epoch 0 comes first."""
    weights: Mapping[int, float] | str = "proportional"
    equal_sizes: bool = False
    seed: int = 0
    resumed_epoch: int | None = None
    """Epoch that started with another spec; its plan holds only `remaining_rows`."""
    remaining_rows: NDArray[np.integer[Any]] | None = None
    """(remaining samples,) sample numbers, as `EpochPlan.remaining` returns them."""
    remaining_pure: int = 0
    """How many of them that spec had in pure partitions."""
    _plans: dict[int, EpochPlan] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_options(
        cls,
        options: CommonITArguments,
        names: Sequence[str],
        group_ids: NDArray[np.integer[Any]],
        *,
        positions: NDArray[np.float64] | None,
        row_counts: NDArray[np.integer[Any]],
        tokens: NDArray[Any] | None,
        **geometry: Any,
    ) -> Self:
        """Build the spec of a run with these `commonit_*` options.

        Args:
            options: give purity, composition and weights.
            names: (groups,) group names; `commonit_weights` may map them to weights.
            group_ids: (samples,) group ids.
            positions: (groups,) of the grouper.
            row_counts: (groups,) rows of each group, to find the small ones; a sample may hold several rows.
            tokens: (samples,) tokens, None if unknown.
            geometry: the other fields.

        Raises:
            ValueError: when `commonit_weights` has an unknown group, or not all groups, and when the heaviest step is
                asked for without token counts.
        """
        if options.commonit_heaviest_first and tokens is None:
            raise ValueError(
                "commonit_heaviest_first=True: the rows have no token counts before training. Set it to False, or "
                "give tokenised rows."
            )
        mixed_groups, left_out_groups = small_groups(options, row_counts)
        return cls(
            group_ids=group_ids,
            purity=options.commonit_purity,
            remainder=options.commonit_remainder,
            pure_fraction=tuple(options.commonit_pure_fraction or (1.0,)),
            order=options.commonit_order,
            positions=positions,
            mixed_groups=mixed_groups,
            left_out_groups=left_out_groups,
            heaviest_first=tokens if options.commonit_heaviest_first else None,
            weights=weights_by_id(options.commonit_weights, names, group_ids),
            **geometry,
        )

    def plan(self, epoch: int = 0) -> EpochPlan:
        """Return the plan of `epoch`, or of its remaining rows where another spec started it.

        Raises:
            ValueError: as `plan_epoch` and `plan_remaining`.
        """
        if epoch not in self._plans:
            same = {name: getattr(self, name) for name in _ARGUMENTS}
            fraction = self.pure_fraction[min(epoch, len(self.pure_fraction) - 1)]
            heaviest = self.heaviest_first if epoch == 0 else None
            plan = plan_epoch(**same, pure_fraction=fraction, heaviest_first=heaviest, epoch=epoch)
            if epoch == self.resumed_epoch:
                assert self.remaining_rows is not None
                rows, pure = self.remaining_rows, self.remaining_pure
                plan = plan_remaining(plan, rows, pure_samples=pure, seed=self.seed, epoch=epoch)
            self._plans.clear()
            self._plans[epoch] = plan
        return self._plans[epoch]

    def remaining(self, epoch: int, steps: int, then: "PlanSpec") -> "PlanSpec":
        """Return `then`, with the samples of `epoch` that remain after `steps` steps of this spec.

        Returns:
            `then` with complete epochs when `steps` is 0 or no sample remains.
        """
        rows = self.plan(epoch).remaining(steps)
        if not steps or not len(rows):
            return then.whole
        pure = self.plan(epoch).remaining_pure(steps)
        return replace(then, resumed_epoch=epoch, remaining_rows=rows, remaining_pure=pure)

    @property
    def whole(self) -> "PlanSpec":
        """This spec without remaining rows: every epoch is complete."""
        return (
            self
            if self.resumed_epoch is None
            else replace(self, resumed_epoch=None, remaining_rows=None, remaining_pure=0)
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the first epoch's complete plan; specs that share it have the same micro-batches in every epoch."""
        return self.whole.plan(0).fingerprint()


def small_groups(
    options: CommonITArguments, row_counts: NDArray[np.integer[Any]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the groups under `commonit_min_group_size` that are mixed, and those that are left out.

    Args:
        row_counts: (groups,) rows of each group.
    """
    small = tuple(np.flatnonzero((row_counts > 0) & (row_counts < options.commonit_min_group_size)).tolist())
    by_choice = {options.commonit_small_groups: small}
    return by_choice.get("mix", ()), by_choice.get("drop", ())


def weights_by_id(weights: Any, names: Sequence[str], group_ids: NDArray[np.integer[Any]]) -> Any:
    """Return `commonit_weights` with group ids for group names.

    Raises:
        ValueError: on an unknown group, and on a group without a weight.
    """
    if isinstance(weights, str):
        return weights
    ids = np.unique(group_ids).tolist()
    present = [names[group] for group in ids]
    unknown = [name for name in weights if name not in present]
    missing = [name for name in present if name not in weights]
    if unknown:
        raise ValueError(
            f"commonit_weights: {unknown[0]!r} is not a group; did you mean {nearest(unknown[0], present)!r}?"
        )
    if missing:
        raise ValueError(f"commonit_weights: no weight for {', '.join(map(repr, missing))}; give each group one.")
    return {group: float(weights[names[group]]) for group in ids}
