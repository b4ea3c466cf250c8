"""Let ranks on CPU train with FSDP2: call `enable` before each Trainer, and reset `AcceleratorState` after it.

accelerate applies FSDP to accelerators only, and trains plain DDP on CPU without a message. torch's own `fully_shard`
runs on CPU tensors with gloo.
"""

from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def enable() -> None:
    """Let the next Accelerator read its FSDP settings; the device and the backend stay cpu and gloo."""
    PartialState(cpu=True, backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def numbers_of_shards(model: Any) -> list[int]:
    """Return over how many ranks FSDP2 shards the parameters of a model; 1 for those that it does not shard."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the last layers stay gathered after an evaluation
    return sorted({p.device_mesh.size() if isinstance(p, DTensor) else 1 for p in model.parameters()})
