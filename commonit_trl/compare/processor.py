"""The name of the processor that a run depends on: processors round differently, and so change its result."""

import platform
import re
from pathlib import Path

import torch


def processor(device: torch.device) -> str:
    """Return the name of a device's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", info.read_text() if info.exists() else "", re.MULTILINE)
    return f"{named[1] if named else platform.machine()} {device.type.upper()}"
