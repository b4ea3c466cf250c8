"""Let ranks on CPU train with FSDP2: call `enable` before each Trainer.

accelerate applies FSDP to accelerators only, and trains plain DDP on CPU without a message. torch's own `fully_shard`
runs on CPU tensors with gloo.
"""

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


def enable() -> None:
    """Let the next Accelerator read its FSDP settings; the device and the backend stay cpu and gloo."""
    AcceleratorState._reset_state(False)
    PartialState(cpu=True, backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
