"""The machine and the versions that a measurement belongs to."""

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

import torchdiffeq_lmm

DISTRIBUTIONS = (
    "torch",
    "torchdiffeq",
    "torchdyn",
    "TorchDiffEqPack",
    "diffrax",
    "jax",
    "numpy",
    "scipy",
)


def processor() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(distribution: str) -> str:
    """The version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, object]:
    """Processor, cores, threads, system and versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torchdiffeq_lmm": torchdiffeq_lmm.__version__,
        **{distribution: version(distribution) for distribution in DISTRIBUTIONS},
    }
