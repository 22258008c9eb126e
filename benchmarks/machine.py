"""What a result was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from setting import Setting

PACKAGES = ("ovi", "torch", "diffusers", "transformers", "flash-attn", "triton")


def machine(setting: Setting) -> dict[str, Any]:
    """Processor, threads, memory in GiB, system, and the GPU where the run used one."""
    said: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
    }
    if torch.device(setting.device).type == "cuda":
        card = torch.cuda.get_device_properties(setting.device)
        said |= {"gpu": card.name, "gpu_memory_gib": round(card.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return said


def packages() -> dict[str, str]:
    """Versions of what matters and is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
