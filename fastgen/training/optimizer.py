"""AdamW as torch has it, less the import of its compiler."""

from __future__ import annotations

import inspect
from typing import Any

import torch


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW (Loshchilov & Hutter 2019), for steps that torch.compile does not see.

    torch keeps its compiler out of some methods of an optimizer, and for that imports it at their first call, which
    takes as long as importing torch. These are the methods themselves.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    _step = staticmethod(inspect.unwrap(torch.optim.AdamW.step))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Takes one step; as torch's, with ``found_inf`` and ``grad_scale`` where they are set."""
        return self._step(self, closure)
