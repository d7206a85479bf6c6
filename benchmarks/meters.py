"""What memory a measurement takes, of its interpreter or of an accelerator. Linux only."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import psutil
import torch

SPARE = 0.8
"""Share of the free memory that a size may be expected to take before it is left out."""


def mebibytes(module: torch.nn.Module) -> float:
    """Return the size of a module's weights and buffers in MiB."""
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values()) / 2**20


def memory(name: str, device: str) -> float:
    """Return MiB of this process, "VmRSS" (now) or "VmHWM" (most), or the same of an accelerator's allocator."""
    if device != "cpu":
        held = torch.cuda.memory_allocated if name == "VmRSS" else torch.cuda.max_memory_allocated
        return held(device) / 2**20
    # ``getrusage`` would count what the parent had held before this process began, too.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def settle(device: str) -> float:
    """Give freed memory back, forget the highest use so far, and return the MiB that are held."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Freed blocks that the allocator keeps would hide what the next call takes.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS", device)


def free_mib(device: str) -> float:
    """Return the free memory of the machine or accelerator in MiB."""
    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info(device)[0]
    return free / 2**20
