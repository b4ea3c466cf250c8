"""CommonIT for TRL: instruction tuning in which every batch holds one group of the data (arXiv 2410.03077).

    from commonit_trl import CommonITSFTConfig, CommonITSFTTrainer

Importing the package imports neither torch nor trl; they come with the names that need them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from commonit_trl.config import CommonITArguments
    from commonit_trl.grouping import Grouper, load_grouper
    from commonit_trl.plan import EpochPlan, PlanSummary, plan_epoch
    from commonit_trl.plan.sampler import CommonITBatchSampler
    from commonit_trl.rows import Rows
    from commonit_trl.trainer.mixin import CommonITMixin
    from commonit_trl.trainer.sft import CommonITSFTConfig, CommonITSFTTrainer

__version__ = "0.1.0"

_HOMES = {
    "CommonITArguments": "config",
    "CommonITBatchSampler": "plan.sampler",
    "CommonITMixin": "trainer.mixin",
    "CommonITSFTConfig": "trainer.sft",
    "CommonITSFTTrainer": "trainer.sft",
    "EpochPlan": "plan",
    "Grouper": "grouping",
    "PlanSummary": "plan",
    "Rows": "rows",
    "load_grouper": "grouping",
    "plan_epoch": "plan",
}
__all__ = [
    "CommonITArguments",
    "CommonITBatchSampler",
    "CommonITMixin",
    "CommonITSFTConfig",
    "CommonITSFTTrainer",
    "EpochPlan",
    "Grouper",
    "PlanSummary",
    "Rows",
    "load_grouper",
    "plan_epoch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
