"""Importing this before Trainers lets ranks on CPU run a real DeepSpeed engine."""

import os

os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")
for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
    os.environ.setdefault(name, value)  # one rank without a launcher
os.environ.setdefault("MASTER_PORT", "0")

import deepspeed  # noqa: E402
from accelerate import PartialState  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo suffices; compiling it takes a minute
PartialState(backend="gloo")
