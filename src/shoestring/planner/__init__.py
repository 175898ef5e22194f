"""A budget in bytes in, an exact plan out.

cost and timing measure one block at a time, chain and solver know what a schedule costs, choose
picks under a budget, make is the door: `plan` for a model, `plan_config` for a config alone.
"""

from .fake import Profile, simulate
from .make import PlanFor, plan, plan_config, planner, planner_for_config
from .plans import Plan, Row, Table, Verification

__all__ = [
    "Plan",
    "PlanFor",
    "Profile",
    "Row",
    "Table",
    "Verification",
    "plan",
    "plan_config",
    "planner",
    "planner_for_config",
    "simulate",
]
