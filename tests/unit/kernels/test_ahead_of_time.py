"""Triton's programs compile for A100, H100, B200 without a GPU: with wide loads, without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs triton: pip install triton")

#: Compiles every program with the sizes of promoe_xl; prints its PTX's wide loads and stores and
#: its machine code's spills.
SCRIPT = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from promoe_ds.kernels import block_programs, programs

D, F, E = 1152, 2304, 12
ONE_TOKEN, TILE = {"D": D, "BLOCK": 2048}, {"ROWS": 16, "BLOCK": 128}
DOT = {"BLOCK_E": 16, "TOKENS": 16}
CONSTANTS = {
    "combine": {**ONE_TOKEN, "HAS_GATES": True, "HAS_BASE": True},
    "combine_backward": ONE_TOKEN,
    "bias_gelu_backward": {"F": F, **TILE},
    "add_bias": {"F": F, "E": E, "HAS_GELU": True, **TILE},
    "sum_rows_by_expert": {"D": D, "E": E, "PARTS": 16, "HAS_IDS": True, **TILE},
    "spread_to_tokens": {**ONE_TOKEN, "E": E},
    "cosine": {"D": D, "E": E, "BLOCK": 128, "EPS": 1e-12, **DOT},
    "modulated_norm": {**ONE_TOKEN, "EPS": 1e-6},
    "modulated_norm_backward": {**ONE_TOKEN, "EPS": 1e-6, "PARTS": 8},
    "gated_residual": ONE_TOKEN,
    "gated_residual_backward": {**ONE_TOKEN, "PARTS": 8},
    "adamw": {"AVERAGES": 2, "BLOCK": 1024},
    "cosine_backward": {"D": D, "E": E, "BLOCK": 128, "EPS": 1e-12, "PARTS": 128, **DOT},
}
IN_FP32 = ("gates_N", "grad_gates_N", "keys_ED", "values_ED", "partial_PED", "cosines_TE",
           "grad_TE", "norms_T", "partial_PBD")
COUNTS = ("R", "T", "N", "S", "B", "stride")
FLOATS = ("lr", "beta1", "beta2", "eps", "weight_decay", "pull", "more_pull")
OF_WEIGHTS = ("weights_N", "exp_avg_N", "exp_avg_sq_N", "averages_N", "more_averages_N", "scalars")

def type_of(name):
    if name in COUNTS:
        return "i32"
    if name in FLOATS:
        return "fp32"
    if name in ("order_N", "starts_T", "token_ids_N", "ids_N"):
        return "*i64"
    return "*i32" if name == "ends_E" else "*fp32" if name in IN_FP32 + OF_WEIGHTS else "*bf16"

result = {}
for name, constants in CONSTANTS.items():
    program = getattr(programs, name, None) or getattr(block_programs, name)
    types = {n: "constexpr" if n in constants else type_of(n) for n in program.arg_names}
    # ZeRO's partitions have N numbers, a multiple of 16; so has a row of modulation.
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(program.arg_names)
               if types[n].startswith("*") or n in ("N", "stride")}
    source = ASTSource(fn=program, signature=types, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 4})
    ptx = compiled.asm["ptx"]
    lines = compiled.asm["sass"].splitlines()
    result[name] = {
        "wide loads": sum(".v4" in line and "ld.global" in line or "cp.async.cg" in line
                          for line in ptx.splitlines()),  # 16 bytes each
        "spills": sum(" STL" in line or " LDL" in line for line in lines),
        "instructions": len(lines),
    }
print(json.dumps(result))
"""


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_programs_compile_with_wide_loads_and_without_spills(tmp_path, capability) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(capability)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 13
    for name, counts in found.items():
        assert counts["instructions"] > 50, name
        assert counts["wide loads"] >= 1, name
        assert counts["spills"] == 0, name
