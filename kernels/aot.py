"""Compile every Triton kernel ahead of time, without a GPU, and tell its registers, spills and shared memory.

``python -m kvtier.kernels.aot`` prints the table, ``--json FILE`` writes it. Must run in a process of its own, with
``TRITON_INTERPRET`` unset: Triton decides at import whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvtier.kernels.variants import VARIANTS, Variant

__all__ = ["TARGETS", "Built", "build", "build_all"]

TARGETS: Final = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
"""Chips by name, with the most bytes of shared memory that a program may ask for there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A kernel compiled for a chip.

    Parameters
    ----------
    registers : int
        Per thread; vector registers on AMD.
    spilled : int
        Bytes of a thread's stack on NVIDIA, spilled vector registers on AMD.
    shared : int
        Bytes of shared memory.
    shared_limit : int
        What the chip has of it for one program.
    """

    operator: str
    variant: str
    target: str
    registers: int
    spilled: int
    shared: int
    shared_limit: int


def build(operator: str, variant: Variant, chip: str) -> Built:
    """Compile one variant for one chip."""
    target, limit = TARGETS[chip]
    kernel: Any = variant.kernel
    constants = dict(variant.constants)
    if target.backend == "hip" and "PRECISION" in constants:
        constants["PRECISION"] = "ieee"
    names: list[str] = kernel.arg_names
    signature = {name: "constexpr" if name in constants else _type_of(name, variant) for name in names}
    # As the launcher specialises them: pointers and strides of real tensors are multiples of 16.
    aligned = [index for index, name in enumerate(names) if name.endswith("_ptr") or name.startswith("stride_")]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options={"num_warps": variant.warps, "num_stages": variant.stages})
    registers, spilled = _amd_usage(compiled) if target.backend == "hip" else _nvidia_usage(compiled)
    return Built(
        operator=operator,
        variant=variant.name,
        target=chip,
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        shared_limit=limit,
    )


def build_all(chips: Sequence[str] = tuple(TARGETS), operators: Sequence[str] = tuple(VARIANTS)) -> Iterator[Built]:
    """Every variant for every chip, as they come."""
    for operator in operators:
        for variant in VARIANTS[operator]:
            for chip in chips:
                yield build(operator, variant, chip)


def _type_of(name: str, variant: Variant) -> str:
    if name.endswith("_ptr"):
        return f"*{variant.pointers[name]}"
    return "fp32" if name in {"scale", "softcap", "base"} else "i32"


def _nvidia_usage(compiled: Any) -> tuple[int, int]:
    """Registers and bytes of stack, told by cuobjdump: Triton itself knows them only where there is a GPU."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if found is None:
        raise RuntimeError(f"cuobjdump tells no registers: {told!r}")
    return int(found[1]), int(found[2])


def _amd_usage(compiled: Any) -> tuple[int, int]:
    text: str = compiled.asm["amdgcn"]
    usage = [re.search(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count")]
    if usage[0] is None or usage[1] is None:
        raise RuntimeError("the assembly for AMD tells no registers")
    return int(usage[0][1]), int(usage[1][1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when something spills on NVIDIA or asks for more shared memory than there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--operators", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, too")
    chosen = parser.parse_args(arguments)
    rows, wrong = [], 0
    sys.stdout.write(f"triton {triton.__version__}\n")
    for built in build_all(chosen.targets, chosen.operators):
        bad = built.shared > built.shared_limit or (built.spilled and built.target.startswith("sm_"))
        wrong += bool(bad)
        rows.append(asdict(built))
        sys.stdout.write(
            f"{built.operator:18} {built.variant:34} {built.target:7} {built.registers:4} registers "
            f"{built.spilled:5} spilled {built.shared:7} bytes shared{'  TOO MUCH' if bad else ''}\n"
        )
        sys.stdout.flush()
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
