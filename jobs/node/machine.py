"""What of a machine decides bits: the CPU, the code path that MKL takes on it, variables that change either.

Tried by training and by single kernels on AMD and (emulated) Intel and Hygon CPUs of several generations: under one
branch of MKL Intel's generations agree, vendors do not (products, exp, log), except under COMPATIBLE, where all do.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Mapping, MutableMapping
from functools import cache
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
# What torch asks for before it uses vectors of 512 bits.
WIDE = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
_BRANCHES = {1: "OFF", 2: "AUTO", 3: "COMPATIBLE", 4: "SSE2", 6: "SSSE3", 7: "SSE4_1", 8: "SSE4_2", 9: "AVX"}
_BRANCHES |= {10: "AVX2", 11: "AVX512_MIC", 12: "AVX512", 13: "AVX512_MIC_E1", 14: "AVX512_E1"}
_ONE, _ALL, _AUTO, _COMPATIBLE, _STRICT = 1, -1, 2, 3, 1 << 16
# Variables whose effect no other fact shows, by the device on which they have one.
VARIABLES: Mapping[str, tuple[str, ...]] = {
    "cpu": (
        "ONEDNN_MAX_CPU_ISA",
        "DNNL_MAX_CPU_ISA",
        "ONEDNN_DEFAULT_FPMATH_MODE",
        "DNNL_DEFAULT_FPMATH_MODE",
        "MKL_ENABLE_INSTRUCTIONS",
    ),
    "cuda": (
        "NVIDIA_TF32_OVERRIDE",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
        "TORCH_BLAS_PREFER_CUBLASLT",
        "CUBLAS_WORKSPACE_CONFIG",
        "NCCL_ALGO",
        "NCCL_PROTO",
    ),
}


def choose_branch(environment: MutableMapping[str, str], fields: Mapping[str, str] | None = None) -> None:
    """Name the branch of this CPU, or of one with such `fields`; what the user has set stays. Before torch is imported.

    One code path for all CPUs that have it: that of AVX-512 on Intel's CPUs with it, a training step takes 0.75x the
    time of AVX2 there, else that of AVX2. MKL takes a named branch on Intel's CPUs alone, elsewhere AUTO stays.
    """
    fields = cpu_fields() if fields is None else fields
    flags = set(fields.get("flags", "").split())
    if fields.get("vendor_id") == "GenuineIntel" and flags >= WIDE:
        environment.setdefault("MKL_CBWR", "AVX512,STRICT")
        environment.setdefault("ATEN_CPU_CAPABILITY", "avx512")
    elif "avx2" in flags:
        environment.setdefault("MKL_CBWR", "AVX2,STRICT")
        environment.setdefault("ATEN_CPU_CAPABILITY", "avx2")
    else:
        environment.setdefault("MKL_CBWR", "AUTO,STRICT")


def variables_of(record: Mapping[str, object], fields: Mapping[str, str]) -> str:
    """Return the variables under which a CPU with `fields` takes the code path of a record, "" where none do that."""
    branch, capability = str(record.get("mkl_branch", "")), str(record.get("cpu_capability", ""))
    needed = {"AVX2": {"avx2"}, "AVX512": WIDE}.get(branch.partition(",")[0])
    flags = set(fields.get("flags", "").split())
    if needed is None or not flags >= needed or fields.get("vendor_id") != record.get("cpu"):
        return ""
    return f"MKL_CBWR={branch} ATEN_CPU_CAPABILITY={capability.lower()}"


@cache
def cpu_fields(path: Path = CPUINFO) -> dict[str, str]:
    """Return what Linux says of the first CPU, {} elsewhere."""
    try:
        first = path.read_text(errors="replace").split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def cpu_name(fields: Mapping[str, str], branch: str) -> str:
    """Return as much of the CPU's name as bits can depend on under a branch of MKL ("" = MKL is not there).

    Nothing under COMPATIBLE, the vendor under a named branch, else vendor, family and model.
    """
    if branch.startswith(_BRANCHES[_COMPATIBLE]):
        return ""
    if vendor := fields.get("vendor_id"):
        named = branch and not branch.startswith((_BRANCHES[_AUTO], "OFF"))
        return vendor if named else f"{vendor} {fields.get('cpu family', '?')}/{fields.get('model', '?')}"
    if implementer := fields.get("CPU implementer"):
        return f"{platform.machine()} {implementer}/{fields.get('CPU part', '?')}"
    return platform.processor() or platform.machine()


def mkl_branch() -> str:
    """Return the branch that MKL takes in this process (`AVX2,STRICT`), "" where torch has no MKL or is not there."""
    torch = sys.modules.get("torch")
    library = Path(torch.__file__ or "").parent / "lib" / "libtorch_cpu.so" if torch else Path()
    if not library.is_file():
        return ""
    loaded = ctypes.CDLL(str(library))
    get, automatic = (getattr(loaded, f"mkl_serv_cbwr_get{name}", None) for name in ("", "_auto_branch"))
    if get is None:
        return ""
    branch, strict = get(_ONE), get(_ALL) & _STRICT
    if branch == _AUTO and automatic is not None:
        branch = automatic()
    return _BRANCHES.get(branch, str(branch)) + (",STRICT" if strict else "")


def has_fast_products() -> bool:
    """Return whether oneDNN multiplies matrices faster than MKL here, and no bits of other CPUs are given up for it.

    MKL takes AVX2 on AMD's CPUs, oneDNN AVX-512 where they have it, twice as fast. On Intel's MKL takes AVX-512 itself,
    in the branch under which their generations agree; on AMD's a CPU is named by its model in any case.
    """
    return "torch" in sys.modules and _are_faster()


@cache
def _are_faster() -> bool:
    """Return `has_fast_products` of a process in which torch is imported."""
    fields, torch = cpu_fields(), sys.modules["torch"]
    if fields.get("vendor_id") != "AuthenticAMD" or "avx512f" not in fields.get("flags", "").split():
        return False
    return mkl_branch().startswith(_BRANCHES[_AUTO]) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def facts(device: str) -> dict[str, Any]:
    """Return the facts of this process's machine that decide bits on `device`, once torch is imported."""
    names = VARIABLES.get(device, ())
    variables = {name: os.environ[name] for name in names if os.environ.get(name)}
    if device != "cpu":
        return {"variables": variables}
    branch = mkl_branch()
    return {
        "mkl_branch": branch,
        "cpu": cpu_name(cpu_fields(), branch),
        "products": "oneDNN" if has_fast_products() else "",
        "variables": variables,
    }
