"""Report the groups of a dataset and the batches of an epoch as numbers, tables and HTML."""

from commonit_trl.report.analysis import Inspection, inspect_groups
from commonit_trl.report.html import write_html
from commonit_trl.report.optional import optional
from commonit_trl.report.summary import epoch_summary, model_card_section, summary_table
from commonit_trl.report.tables import print_inspections, print_sizes

__all__ = [
    "Inspection",
    "epoch_summary",
    "inspect_groups",
    "model_card_section",
    "optional",
    "print_inspections",
    "print_sizes",
    "summary_table",
    "write_html",
]
