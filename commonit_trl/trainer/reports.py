"""Reports of a run: the epoch summary, the HTML report, and the section of the model card.

A report that cannot be made is a warning. It never ends a run.
"""

import logging
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from commonit_trl.files import write_text
from commonit_trl.grouping.fit import data_seed
from commonit_trl.report import (
    Inspection,
    inspect_groups,
    model_card_section,
    optional,
    summary_table,
    write_html,
)
from commonit_trl.rows import Rows
from commonit_trl.trainer.checkpoint import COMMONIT_DIR

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
_CARD_SETTINGS = (
    "commonit_metric",
    "commonit_purity",
    "commonit_remainder",
    "commonit_pure_fraction",
    "commonit_order",
    "commonit_weights",
)
_GROUPS_NAMED = 5


def log_summary(trainer: Any) -> None:
    """Show the epoch summary, and warn of samples that are dropped, left out or repeated."""
    args, log = trainer.args, trainer.commonit_logger
    with optional("the epoch summary", log):
        entry = trainer.commonit.summary()
        _show(
            f"commonit_metric={args.commonit_metric}: {len(entry['groups'])} groups, {entry['steps']} steps per epoch "
            f"(baseline: {entry['baseline_steps']}), {entry['pure_steps']} of them of one group; {entry['samples']} "
            f"samples, {entry['left_out']} left out, {entry['repeated']} repeated, {entry['dropped']['rows']} rows "
            f"dropped.\n{summary_table(entry)}",
            log,
            args,
        )
        for reason, rows in entry["dropped"]["by_reason"].items():
            log.warning(
                "%d rows are not trained: %s (groups: %s). Raise max_length, or look at the rows.",
                rows,
                reason,
                _largest(trainer.commonit.grouping.dropped.by_group),
            )
        for count, verb in (("left_out", "leaves out"), ("repeated", "repeats")):
            affected = {group["name"]: group[count] for group in entry["groups"] if group[count]}
            if affected:
                log.warning(
                    "An epoch %s %d of %d samples, in %d groups (most: %s). %s",
                    verb,
                    entry[count],
                    entry["samples"],
                    len(affected),
                    _largest(affected),
                    _ways_out(args, count),
                )


def _ways_out(args: Any, count: str) -> str:
    """Return what would train each sample once, where `count` (`left_out` or `repeated`) is not 0."""
    if args.commonit_weights != "proportional":
        return "commonit_weights='proportional' trains each sample once."
    if count == "left_out" and args.commonit_small_groups == "drop":
        return "They are in small groups: commonit_small_groups='merge' trains them."
    if count == "left_out":
        return f"commonit_remainder={args.commonit_remainder!r} leaves them out: 'keep' or 'mix' trains them."
    return "commonit_remainder='mix' trains each sample once; commonit_min_group_size merges small groups."


def _show(text: str, log: logging.Logger, args: Any) -> None:
    """Log `text` where loggers show it; else print it, as transformers' `ProgressCallback` prints training logs.

    Nothing is printed with `disable_tqdm`, or with a level of the logger or a `log_level` above warning.
    """
    if log.isEnabledFor(logging.INFO):
        log.info("%s", text)
        return
    silenced = args.disable_tqdm or args.get_process_log_level() > logging.WARNING
    if not silenced and log.isEnabledFor(logging.WARNING):
        tqdm.write(text)


def _largest(counts: dict[str, int]) -> str:
    most = sorted(counts.items(), key=lambda item: -item[1])
    named = ", ".join(f"{count} of {name!r}" for name, count in most[:_GROUPS_NAMED])
    return named if len(most) <= _GROUPS_NAMED else f"{named}, and {len(most) - _GROUPS_NAMED} more"


def inspect_run(trainer: Any) -> Inspection | None:
    """Compute the numbers of the first epoch for the report; None where they cannot be had."""
    run, args = trainer.commonit, trainer.args
    with optional("all numbers", trainer.commonit_logger):
        lengths, plan = run.spec.lengths, run.spec.whole.plan(0)
        if lengths is None and len(trainer.train_dataset) == len(plan.group_ids):
            trained = Rows(trainer.train_dataset)
            lengths = trained.token_counts("total") if trained.tokenized else None
        return inspect_groups(
            run.grouping.grouper,
            run.grouping.group_ids,
            run.grouping.rows,
            plan,
            options=args,
            lengths=lengths,
            padding_free=getattr(trainer, "padding_free", False),  # SFTTrainer's
            seed=data_seed(args),
            embed=True,
            dropped=run.grouping.dropped,
        )
    return None


def write_report(trainer: Any, inspection: Inspection | None) -> None:
    """Write the HTML report, with the losses logged until now."""
    if inspection is None:
        return
    history = trainer.state.log_history
    losses = {
        name: [(int(entry["step"]), entry[f"loss_{name}"]) for entry in history if f"loss_{name}" in entry]
        for name in trainer.commonit.grouping.names
    }
    path = Path(trainer.args.output_dir) / COMMONIT_DIR / REPORT_FILE
    with optional(f"the file {path}", trainer.commonit_logger):
        write_html(path, [inspection], losses)


def extend_model_card(trainer: Any) -> None:
    """Add a section on the groups to the model card, if there is one."""
    path = Path(trainer.args.output_dir) / "README.md"
    with optional(f"the section of {path}", trainer.commonit_logger):
        if path.exists():
            settings = {name: getattr(trainer.args, name) for name in _CARD_SETTINGS}
            section = model_card_section(trainer.commonit.summary(), settings)
            card = path.read_text(encoding="utf-8").partition("\n## CommonIT\n")[0].rstrip()
            write_text(path, f"{card}\n\n{section}")
