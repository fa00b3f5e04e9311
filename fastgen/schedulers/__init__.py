"""diffusers' schedulers on fused kernels: the same names, configs, calls and results, and one pass over memory a step.

    pipe.scheduler = fastgen.schedulers.DDIMScheduler.from_config(pipe.scheduler.config)

diffusers is not needed. A setting that is not there raises UsageError and is never left out in silence.
"""

from fastgen.schedulers.ddim import DDIMScheduler
from fastgen.schedulers.ddpm import DDPMScheduler
from fastgen.schedulers.dpm_solver import DPMSolverMultistepScheduler
from fastgen.schedulers.euler import EulerDiscreteScheduler
from fastgen.schedulers.heun import HeunDiscreteScheduler

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
]
