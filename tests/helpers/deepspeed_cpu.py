"""Importing this before Trainers lets ranks on CPU run a real DeepSpeed engine."""

import os

os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")

import deepspeed
from accelerate import PartialState

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo suffices; compiling it takes a minute
PartialState(backend="gloo")
