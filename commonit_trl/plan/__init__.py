"""Which samples make up which micro-batch: epoch plans, and the batch sampler that yields them."""

from commonit_trl.plan.epoch import EpochPlan, PlanSummary, plan_epoch, plan_rest
from commonit_trl.plan.spec import PlanSpec

__all__ = ["EpochPlan", "PlanSpec", "PlanSummary", "plan_epoch", "plan_rest"]
