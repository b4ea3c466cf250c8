"""Replay a few hundred damaged inputs per fuzz target: each is read, or refused in one line."""

import logging
import random

import pytest
import targets


@pytest.mark.parametrize("name", targets.TARGETS)
def test_damaged_input_is_read_or_refused(name, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL, "commonit_trl")  # a message per input
    target = targets.TARGETS[name](tmp_path)
    for seed in target.seeds:
        target.run(seed)
    rng = random.Random(0)
    for number in range(60 if target.slow else 300):
        damaged = targets.mutate(target.seeds[number % len(target.seeds)], rng)
        try:
            target.run(damaged)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}, for {damaged[:500]!r}") from error
