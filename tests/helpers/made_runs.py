"""Synthetic results of runs to compare: equal rows and weights, and losses by formula."""

import numpy as np

from commonit_trl.compare.comparison import compare
from commonit_trl.compare.runs import RunResult
from commonit_trl.compare.strategies import Run, parse_strategies

ROWS = 60
STRATEGIES = {strategy.name: strategy for strategy in parse_strategies("--metrics", "none,task,length:num_groups=2")}


def result(strategy, seed, shift=0.0, scores=None, groups=("first", "second"), **written):
    """Return a run whose loss per token is `shift` above the baseline's, plus noise."""
    tokens = np.random.default_rng(0).integers(4, 30, ROWS)
    per_token = 2 + np.random.default_rng(1).random(ROWS) + shift
    per_token = per_token + 0.01 * np.random.default_rng([seed, len(strategy)]).standard_normal(ROWS)
    groups = [] if strategy == "none" else groups
    return RunResult(
        run=Run(strategy=STRATEGIES[strategy], seed=seed),
        written={
            "weights": f"of seed {seed}",
            "processor": "one CPU",
            "groups": list(groups),
            "left_out": min(len(groups), 1),
            "repeated": len(groups),
            "steps": 10,
            "epochs": 1.0,
            "tokens": 900,
            "computed_tokens": 1_200,
            "tokens_per_second": 300.0,
            "curves": {"loss": [[0.5, 3.0 + shift], [1.0, 2.0 + shift]], "eval_loss": []},
            **written,
        },
        loss=per_token * tokens,
        correct=tokens // 2,
        tokens=tokens,
        group_ids=np.arange(ROWS) % len(groups) if groups else np.full(ROWS, -1),
        scores=scores or {},
    )


def compared(results, **more):
    return compare(results, **{"train_rows": 500, "failed": {}, **more})
