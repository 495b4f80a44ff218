"""Sharded training that can be resumed."""

from __future__ import annotations

from typing import Any

from mmengine._strategy import FSDPStrategy
from mmengine.registry import STRATEGIES
from torch.distributed.fsdp import FullyShardedDataParallel


@STRATEGIES.register_module()
class SubquadFSDPStrategy(FSDPStrategy):
    """mmengine's FSDP strategy, whose optimizer states torch accepts.

    mmengine hands them over in the order of arguments that torch had before 2.1, so that no run could be resumed.
    """

    def load_optim_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the optimizer's state from a checkpoint."""
        optimizer = self.optim_wrapper.optimizer
        sharded = FullyShardedDataParallel.optim_state_dict_to_load(self.model, optimizer, state_dict)
        self.optim_wrapper.load_state_dict(sharded)
