"""Texts that inject code into terminals, HTML, JSON inside HTML, plotly labels and rich markup."""

from datasets import Dataset

from commonit_trl.config import CommonITArguments
from commonit_trl.grouping import TaskGrouper
from commonit_trl.grouping.dropped import NONE_DROPPED
from commonit_trl.plan import plan_epoch
from commonit_trl.report import inspect_groups
from commonit_trl.rows import Rows

HOSTILE = {
    "script": "<script>window.ran='script';document.title='ran'</script>",
    "end of a script": "</script><script>window.ran='end'</script><!--",
    "handler": "<img src=x onerror=\"window.ran='handler'\">",
    "svg": "<svg onload=\"window.ran='svg'\"><circle r=9></svg>",
    "quotes": "\" onmouseover=\"window.ran='quotes'\" x='",
    "link": '<a href="javascript:window.ran=1">press</a> <b>bold</b>',
    "entities": "&lt;script&gt;window.ran='entity'&lt;/script&gt; &amp;amp;",
    "template": "{{ 7 * 7 }} {% raw %} %{x} %{customdata} ${alert(1)} $\\href{javascript:alert(1)}{x}$",
    "markup": "[bold red]loud[/] [link=https://example.org]press[/link] [/]",
    "escape": "\x1b[2J\x1b]0;title\x07\x1b[31mred \x9b5m \x00nul \r\noverwritten \x7f",
    "direction": "abc \u202egnp.exe\u202c \u2066x\u2069 שלום مرحبا \u2028next",
}
# The first text as it must appear when escaped.
SHOWN_SCRIPT = HOSTILE["script"]


def hostile_rows() -> Dataset:
    """Make four rows per text, which is task, prompt and response at once."""
    rows = [
        {
            "task": text,
            "prompt": f"{kind} {text}",
            "completion": text,
            "input_ids": [1] * 9,
            "labels": [-100] * 4 + [1] * 5,
        }
        for kind, text in HOSTILE.items()
        for _ in range(4)
    ]
    return Dataset.from_list(rows)


def hostile_inspection(dropped=NONE_DROPPED):
    """Inspect `hostile_rows` by task."""
    rows = Rows(hostile_rows())
    grouper = TaskGrouper(columns=["task"]).fit(rows)
    grouper.notices.append(f"a notice about {SHOWN_SCRIPT} [bold]{HOSTILE['escape']}")
    ids, lengths = grouper.assign(rows), rows.token_counts()
    plan = plan_epoch(ids, lengths, micro_batch_size=2, accumulation_steps=2)
    options = CommonITArguments(commonit_metric="task")
    return inspect_groups(grouper, ids, rows, plan, options=options, lengths=lengths, dropped=dropped)
