"""Draw docs/batches.svg: the steps of one epoch, mixed (baseline) and pure (CommonIT).

Steps: (1) plan an epoch of three small groups with `plan_epoch`, and shuffle the same samples for the baseline;
(2) draw each sample as a square in the colour of its group. All colours are readable on white and on black.

    python -m docs.make_batches

tests/docs/test_pages.py fails when the picture differs from the plan. Cost: a second.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from commonit_trl import plan_epoch

PICTURE = Path(__file__).parent / "batches.svg"
GROUPS = {"maths": ("#0072b2", 40), "code": ("#e69f00", 32), "function calls": ("#009e73", 24)}  # colour, samples
STEP = 8
COLUMNS = 2
SQUARE, GAP, STEP_GAP = 15, 3, 14
LEFT, WIDTH = 12, 760
TEXT = 'font-family="system-ui, sans-serif" font-size="15" fill="#7d8590"'


def steps() -> tuple[list[list[int]], list[list[int]]]:
    """Return the groups of the samples of each step: of random order, and of a plan."""
    group_ids = np.repeat(np.arange(len(GROUPS)), [count for _, count in GROUPS.values()])
    plan = plan_epoch(group_ids=group_ids, micro_batch_size=STEP, world_size=1, accumulation_steps=1, seed=1, epoch=0)
    shuffled = np.random.default_rng(0).permutation(group_ids)
    pure = [group_ids[np.asarray(rows)].tolist() for rows in plan.batches(rank=0)]
    return shuffled.reshape(-1, STEP).tolist(), pure


def draw() -> str:
    """Return the picture as SVG."""
    mixed, pure = steps()
    panel = STEP // COLUMNS * (SQUARE + GAP) + 64
    parts = _panel("Random order: each optimizer step mixes groups", mixed, 24)
    parts += _panel("CommonIT: each step holds one group, and the order of steps is random", pure, 24 + panel)
    top, left = 2 * panel + 18, LEFT
    for name, (colour, _) in GROUPS.items():
        parts.append(f'<rect x="{left}" y="{top - 12}" width="{SQUARE}" height="{SQUARE}" rx="3" fill="{colour}"/>')
        parts.append(f'<text x="{left + SQUARE + 6}" y="{top}" {TEXT}>{name}</text>')
        left += 70 + 9 * len(name)
    parts.append(f'<text x="{WIDTH - 12}" y="{top}" text-anchor="end" {TEXT}>optimizer steps of one epoch →</text>')
    label = "The samples of each optimizer step, coloured by group: mixed in random order, of one group with CommonIT"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 14}" width="{WIDTH}" '
        f'height="{top + 14}" role="img" aria-label="{label}">\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(title: str, groups_of_steps: Sequence[Sequence[int]], top: int) -> list[str]:
    """Return the elements of one row of steps below its title."""
    colours = [colour for colour, _ in GROUPS.values()]
    parts = [f'<text x="{LEFT}" y="{top}" {TEXT} font-weight="600">{title}</text>']
    cell, width, rows = SQUARE + GAP, COLUMNS * (SQUARE + GAP), STEP // COLUMNS
    for number, groups in enumerate(groups_of_steps):
        left, first = LEFT + 5 + number * (width + GAP + STEP_GAP + 10), top + 20
        parts.append(
            f'<rect x="{left - 5}" y="{first - 5}" width="{width - GAP + 10}" height="{rows * cell - GAP + 10}" rx="6" '
            'fill="none" stroke="#7d8590" stroke-opacity="0.5"/>'
        )
        parts += [
            f'<rect x="{left + index % COLUMNS * cell}" y="{first + index // COLUMNS * cell}" width="{SQUARE}" '
            f'height="{SQUARE}" rx="3" fill="{colours[group]}"/>'
            for index, group in enumerate(groups)
        ]
    return parts


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
