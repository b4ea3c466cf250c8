"""Plan the micro-batches of an epoch, and yield them to a dataloader."""

from commonit_trl.plan.epoch import EpochPlan, PlanSummary, plan_epoch, plan_remaining
from commonit_trl.plan.spec import PlanSpec

__all__ = ["EpochPlan", "PlanSpec", "PlanSummary", "plan_epoch", "plan_remaining"]
