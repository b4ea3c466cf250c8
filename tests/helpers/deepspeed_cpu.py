"""Importing this before Trainers lets ranks on CPU run a real DeepSpeed engine."""

import os

os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
os.environ.update(ONE_RANK if "RANK" not in os.environ else {})

import deepspeed
from accelerate import PartialState

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo suffices; compiling it takes a minute
PartialState(backend="gloo")
