"""Draw docs/batches.svg and docs/compositions.svg: the samples of each optimizer step, coloured by group.

Steps: (1) plan epochs of three small groups with `plan_epoch`, and shuffle the same samples for the baseline; (2) draw
each sample as a square in the colour of its group. All colours are readable on white and on black.

    python -m docs.make_batches

tests/docs/test_pages.py fails when a picture differs from the plans. Cost: a second.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from commonit_trl import plan_epoch

PICTURE = Path(__file__).parent / "batches.svg"
COMPOSITIONS_PICTURE = PICTURE.with_name("compositions.svg")
# Colour and samples of each group; some do not fill the last step.
GROUPS = {"maths": ("#0072b2", 40), "code": ("#e69f00", 32), "function calls": ("#009e73", 24)}
UNEVEN_GROUPS = {"short": ("#0072b2", 35), "medium": ("#e69f00", 30), "long": ("#009e73", 23)}
COMPOSITIONS: dict[str, dict[str, Any]] = {
    "keep: the steps of a group differ by at most one row (default)": {},
    "mix: they fill steps with the rows of near groups": {"remainder": "mix"},
    "mix, pure fraction 0.5: half of the full steps stay pure": {"remainder": "mix", "pure_fraction": 0.5},
    "mix, pure fraction 0: random batches": {"remainder": "mix", "pure_fraction": 0.0},
    "mix, order ascending: short rows first": {"remainder": "mix", "order": "ascending"},
}
STEP = 8
COLUMNS = 2
SQUARE, GAP, STEP_GAP = 15, 3, 14
LEFT, WIDTH = 12, 760
TEXT = 'font-family="system-ui, sans-serif" font-size="15" fill="#7d8590"'


def planned_steps(groups: Mapping[str, tuple[str, int]], **composition: Any) -> list[list[int]]:
    """Return the groups of the samples of each step of a plan."""
    group_ids = np.repeat(np.arange(len(groups)), [count for _, count in groups.values()])
    plan = plan_epoch(group_ids, micro_batch_size=STEP, positions=range(len(groups)), seed=1, **composition)
    return [sorted(group_ids[np.asarray(rows)].tolist()) for rows in plan.batches(rank=0)]


def steps() -> tuple[list[list[int]], list[list[int]]]:
    """Return the groups of the samples of each step: of random order, and of a plan."""
    group_ids = np.repeat(np.arange(len(GROUPS)), [count for _, count in GROUPS.values()])
    return np.random.default_rng(0).permutation(group_ids).reshape(-1, STEP).tolist(), planned_steps(GROUPS)


def draw() -> str:
    """Return the picture of mixed and pure steps as SVG."""
    mixed, pure = steps()
    return _picture(
        {
            "Random order: each optimizer step mixes groups": mixed,
            "CommonIT: each step holds one group, and the order of steps is random": pure,
        },
        GROUPS,
        "The samples of each optimizer step, coloured by group: mixed in random order, of one group with CommonIT",
    )


def draw_compositions() -> str:
    """Return the picture of five compositions of the same samples as SVG."""
    panels = {title: planned_steps(UNEVEN_GROUPS, **options) for title, options in COMPOSITIONS.items()}
    label = "The samples of each optimizer step, coloured by group, for five compositions of an epoch"
    return _picture(panels, UNEVEN_GROUPS, label)


def _picture(panels: Mapping[str, list[list[int]]], groups: Mapping[str, tuple[str, int]], label: str) -> str:
    height = STEP // COLUMNS * (SQUARE + GAP) + 64
    colours = [colour for colour, _ in groups.values()]
    parts = [
        element
        for number, (title, groups_of_steps) in enumerate(panels.items())
        for element in _panel(title, groups_of_steps, colours, 24 + number * height)
    ]
    top, left = len(panels) * height + 18, LEFT
    for name, (colour, _) in groups.items():
        parts.append(f'<rect x="{left}" y="{top - 12}" width="{SQUARE}" height="{SQUARE}" rx="3" fill="{colour}"/>')
        parts.append(f'<text x="{left + SQUARE + 6}" y="{top}" {TEXT}>{name}</text>')
        left += 70 + 9 * len(name)
    parts.append(f'<text x="{WIDTH - 12}" y="{top}" text-anchor="end" {TEXT}>optimizer steps of one epoch →</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 14}" width="{WIDTH}" '
        f'height="{top + 14}" role="img" aria-label="{label}">\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(title: str, groups_of_steps: Sequence[Sequence[int]], colours: Sequence[str], top: int) -> list[str]:
    """Return the elements of one row of steps below its title."""
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
    COMPOSITIONS_PICTURE.write_text(draw_compositions(), encoding="utf-8")
