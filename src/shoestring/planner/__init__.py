"""A budget in bytes in, an exact plan out.

cost and timing measure one block at a time, chain and solver know what a schedule costs, choose
picks under a budget, make is the door: `plan` for a model, `plan_config` for a config alone.
sweep answers every budget at once, limits the inverse questions.
"""

from .fake import Profile, simulate
from .limits import Limit, largest
from .make import PlanFor, plan, plan_config, planner, planner_for_config
from .plans import Plan, Row, Table, Verification
from .sweep import Point, Sweep, sweep

__all__ = [
    "Limit",
    "Plan",
    "PlanFor",
    "Point",
    "Profile",
    "Row",
    "Sweep",
    "Table",
    "Verification",
    "largest",
    "plan",
    "plan_config",
    "planner",
    "planner_for_config",
    "simulate",
    "sweep",
]
