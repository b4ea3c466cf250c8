"""Which samples make up which micro-batch: epoch plans, and the batch sampler that yields them."""

from commonit_trl.plan.epoch import EpochPlan, PlanSummary, plan_epoch, plan_rest

__all__ = ["EpochPlan", "PlanSummary", "plan_epoch", "plan_rest"]
