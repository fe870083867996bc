"""Before a plan is loaded: can this machine run it, and if not, what puts that right?

A plan is bound to the version of the library that built it and, more or less, to the
GPU. The manifest says to which; ``here`` looks at the machine, and ``plan_problem``
holds one against the other. Neither reads the plan, and neither imports TensorRT into
this process.
"""

from .choose import fitting_gpu, runnable_plans
from .machine import Gpu, Here, here, library_version
from .rebuild import rebuild_if_stale
from .rules import PlanProblem, built_for, found_here, plan_problem

__all__ = [
    "Gpu",
    "Here",
    "PlanProblem",
    "built_for",
    "fitting_gpu",
    "found_here",
    "here",
    "library_version",
    "plan_problem",
    "rebuild_if_stale",
    "runnable_plans",
]
