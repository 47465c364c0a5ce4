"""Equal numerics promise equal bits, whatever the CPU and the shell: what decides bits is fixed, or recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.node import machine, numerics
from orchestrator.errors import NumericsError
from orchestrator.spec.cell import Execution, Resources

ROOT = Path(__file__).parents[2]
# What a job of a node does before it computes, then products of matrices and what training takes of them.
PROBE = """
import hashlib, json
from jobs.node import numerics
from orchestrator.spec.cell import Execution, Resources
numerics.set_threads(Resources())
import torch
numerics.prepare_torch(Execution(), Resources())
draw = torch.Generator().manual_seed(0)
x, w = torch.rand(256, 96, generator=draw), torch.rand(96, 192, generator=draw).requires_grad_()
y = (x @ w).softmax(-1)
y.square().sum().backward()
bits = hashlib.sha256(y.detach().numpy().tobytes() + w.grad.numpy().tobytes()).hexdigest()
print(json.dumps([numerics.record(Execution(), Resources(), 1), bits]))
"""
SHELLS: dict[str, dict[str, str]] = {
    "plain": {},
    "MKL_CBWR": {"MKL_CBWR": "COMPATIBLE"},
    "ATEN_CPU_CAPABILITY": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}


@pytest.fixture(scope="module")
def probes() -> dict[str, tuple[dict[str, Any], str]]:
    """(numerics record, bits) of the same computation from different shells."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MKL_", "ATEN_", "ONEDNN_", "DNNL_"))}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", PROBE], cwd=ROOT, env={**clean, **shell}, stdout=subprocess.PIPE, text=True
        )
        for name, shell in SHELLS.items()
    }
    said = {name: process.communicate(timeout=300)[0] for name, process in started.items()}
    return {name: tuple(json.loads(text)) for name, text in said.items()}


def test_equal_records_are_equal_bits_from_any_shell(probes: dict[str, tuple[dict[str, Any], str]]) -> None:
    bits: dict[str, set[str]] = {}
    for record, found in probes.values():
        bits.setdefault(json.dumps(record, sort_keys=True), set()).add(found)
    assert all(len(found) == 1 for found in bits.values())


@pytest.mark.skipif("avx2" not in machine.cpu_fields().get("flags", ""), reason="this CPU has one code path")
def test_a_variable_that_changes_bits_is_seen_and_refused(probes: dict[str, tuple[dict[str, Any], str]]) -> None:
    own = probes["plain"][0]
    own_path: dict[str, str] = {}
    machine.choose_branch(own_path)
    wide = own_path["ATEN_CPU_CAPABILITY"].upper()
    assert own["cpu_capability"] == wide, "one code path on every CPU that has it"
    assert own["variables"] == {}
    with pytest.raises(NumericsError, match="mkl_branch COMPATIBLE -> "):
        numerics.refuse_other(probes["MKL_CBWR"][0], own, "a state")
    with pytest.raises(
        NumericsError, match=f"cpu_capability DEFAULT -> {wide}, variables ONEDNN_MAX_CPU_ISA=SSE41 -> none"
    ):
        numerics.refuse_other(probes["ATEN_CPU_CAPABILITY"][0], own, "a state")
    assert len({bits for _, bits in probes.values()}) == 3


def test_a_users_own_choice_stays() -> None:
    shell = {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "avx512"}
    machine.choose_branch(shell)
    assert shell == {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "avx512"}


INTEL = {"vendor_id": "GenuineIntel", "cpu family": "6", "model": "106"}
AMD = {"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "1"}
WIDE = "fpu avx2 avx512f avx512dq avx512cd avx512bw avx512vl"
AVX2_PATH = {"MKL_CBWR": "AVX2,STRICT", "ATEN_CPU_CAPABILITY": "avx2"}
AVX512_PATH = {"MKL_CBWR": "AVX512,STRICT", "ATEN_CPU_CAPABILITY": "avx512"}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({**INTEL, "flags": WIDE}, AVX512_PATH),
        ({**INTEL, "flags": "fpu avx2"}, AVX2_PATH),
        ({**INTEL, "flags": "fpu avx2 avx512f avx512cd"}, AVX2_PATH),  # torch asks for more than the first AVX-512 had
        ({**AMD, "flags": WIDE}, AVX2_PATH),
        ({**AMD, "flags": "fpu sse4_2"}, {"MKL_CBWR": "AUTO,STRICT"}),
        ({}, {"MKL_CBWR": "AUTO,STRICT"}),
    ],
)
def test_a_cpu_takes_the_widest_path_that_its_generations_share(fields: dict[str, str], path: dict[str, str]) -> None:
    found: dict[str, str] = {}
    machine.choose_branch(found, fields)
    assert found == path


@pytest.mark.parametrize(
    ("record", "flags", "said"),
    [
        ({"mkl_branch": "AVX2,STRICT", "cpu_capability": "AVX2", "cpu": "GenuineIntel"}, WIDE, AVX2_PATH),
        ({"mkl_branch": "AVX512,STRICT", "cpu_capability": "AVX512", "cpu": "GenuineIntel"}, WIDE, AVX512_PATH),
        ({"mkl_branch": "AVX512,STRICT", "cpu_capability": "AVX512", "cpu": "GenuineIntel"}, "fpu avx2", {}),
        ({"mkl_branch": "AUTO,STRICT", "cpu_capability": "AVX2", "cpu": "AuthenticAMD 25/1"}, WIDE, {}),
        ({"mkl_branch": "", "cpu_capability": "AVX2", "cpu": "GenuineIntel"}, WIDE, {}),
        ({}, WIDE, {}),
    ],
)
def test_a_refusal_names_the_variables_of_the_path_that_made_a_state(
    record: dict[str, str], flags: str, said: dict[str, str]
) -> None:
    found = machine.variables_of(record, {**INTEL, "flags": flags})
    assert found == " ".join(f"{name}={value}" for name, value in said.items())


@pytest.mark.parametrize(
    ("fields", "branch", "name"),
    [
        (INTEL, "AVX2,STRICT", "GenuineIntel"),
        ({**INTEL, "model": "63"}, "AVX2,STRICT", "GenuineIntel"),
        (INTEL, "AUTO,STRICT", "GenuineIntel 6/106"),
        (AMD, "AUTO,STRICT", "AuthenticAMD 25/1"),
        (AMD, "OFF", "AuthenticAMD 25/1"),
        (AMD, "COMPATIBLE", ""),
        (INTEL, "COMPATIBLE", ""),
        (AMD, "", "AuthenticAMD 25/1"),
    ],
)
def test_a_cpu_is_named_as_far_as_bits_depend_on_it(fields: dict[str, str], branch: str, name: str) -> None:
    assert machine.cpu_name(fields, branch) == name


def test_the_first_cpu_is_read(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nvendor_id\t: A\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nvendor_id\t: B\n")
    assert machine.cpu_fields(info) == {"processor": "0", "vendor_id": "A", "flags": "fpu avx2"}
    assert machine.cpu_fields(tmp_path / "none") == {}


def test_a_gpu_records_its_own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine.facts("cuda")["variables"]["NVIDIA_TF32_OVERRIDE"] == "0"
    assert "cpu" not in machine.facts("cuda")
    assert machine.facts("cpu")["variables"] == {"ONEDNN_MAX_CPU_ISA": "AVX2"}


def test_another_cpu_is_refused_and_what_an_old_manifest_does_not_say_is_not_compared() -> None:
    own = {**numerics.record(Execution(), Resources(), 1), "cpu": "AuthenticAMD 25/1", "variables": {}}
    with pytest.raises(NumericsError, match="cpu GenuineIntel -> AuthenticAMD 25/1"):
        numerics.refuse_other({**own, "cpu": "GenuineIntel"}, own, "a state")
    with pytest.raises(NumericsError, match="variables NCCL_ALGO=Tree -> none"):
        numerics.refuse_other({**own, "variables": {"NCCL_ALGO": "Tree"}}, own, "a state")
    old = {name: value for name, value in own.items() if name not in ("cpu", "mkl_branch", "variables")}
    numerics.refuse_other(old, own, "a state")
