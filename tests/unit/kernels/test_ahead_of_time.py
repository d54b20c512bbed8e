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
from promoe_ds.kernels import block_programs, programs, router_programs, sort_programs

MODULES = (programs, block_programs, router_programs, sort_programs)
D, F, E = 1152, 2304, 12
ONE_TOKEN, TILE = {"D": D, "BLOCK": 2048}, {"ROWS": 16, "BLOCK": 128}
EXPERTS = {"E": E, "BLOCK_E": 16}
KEYS = {**EXPERTS, "D": D, "BLOCK": 128}
CHOICES = {**EXPERTS, "CHOICES": 512, "ROWS": 64, "JOINS": True}
CONSTANTS = {
    "combine": {**ONE_TOKEN, "HAS_GATES": True, "HAS_BASE": True},
    "combine_backward": ONE_TOKEN,
    "bias_gelu_backward": {"F": F, "E": E, "PARTS": 16, "HAS_ENDS": True, **TILE},
    "add_bias": {"F": F, "E": E, "HAS_GELU": True, "HAS_ENDS": True, **TILE},
    "join_heads": {"D": D, **TILE},
    "sum_rows_by_expert": {"D": D, "E": E, "PARTS": 16, "HAS_IDS": True, **TILE},
    "spread_to_tokens": {**ONE_TOKEN, "E": E, "BASES": 2},
    "cosine": {**KEYS, "EPS": 1e-12, "TOKENS": 16},
    "modulated_norm": {**ONE_TOKEN, "EPS": 1e-6, "IS_CENTRED": True, "HAS_RESIDUAL": True},
    "modulated_norm_backward": {
        **ONE_TOKEN, "EPS": 1e-6, "PARTS": 8, "IS_CENTRED": True, "HAS_BASE": True,
        "HAS_RESIDUAL": True
    },
    "sum_parts": {"ROWS": 8, "BLOCK": 128},
    "gated_residual": ONE_TOKEN,
    "gated_residual_backward": {**ONE_TOKEN, "PARTS": 8},
    "adamw": {"AVERAGES": 2, "BLOCK": 1024},
    "cosine_backward": {**KEYS, "EPS": 1e-12, "PARTS": 128, "HAS_BASE": True, "TOKENS": 16},
    "cosine_backward_keys": {"D": D, "E": E, "BLOCK": 128, "EPS": 1e-12, "ROWS": 16},
    "mean_similarity": {**KEYS, "EPS": 1e-12},
    "contrast": {**KEYS, "EPS": 1e-12},
    "contrast_backward": KEYS,
    "count_choices": CHOICES,
    "place_choices": {**CHOICES, "K": 2},
    "place_choices_backward": {"K": 2, "CHOICES": 512, "BLOCK": 1024},
}
IN_FP32 = ("gates_N", "grad_gates_N", "values_ED", "cosines_TE", "grad_TE", "norms_T", "along_PE",
           "key_norms_E", "gates_BC", "gate_sums_BE", "grad_N", "grad_C", "sums_ED", "loss",
           "slopes_EE", "vectors_4E", "grad", "grad_sums_ED", "out")
IN_INT64 = ("order_N", "starts_T", "token_ids_N", "ids_N", "ids_BC", "counts_BE", "counts_E")
COUNTS = ("R", "T", "N", "S", "B", "PARTS", "N_CHOICES", "stride")
FLOATS = ("lr", "beta1", "beta2", "eps", "weight_decay", "pull", "more_pull", "weight",
          "temperature")
OF_WEIGHTS = ("weights_N", "exp_avg_N", "exp_avg_sq_N", "averages_N", "more_averages_N", "scalars")

def type_of(name):
    if name in COUNTS:
        return "i32"
    if name in FLOATS:
        return "fp32"
    if name in IN_INT64:
        return "*i64"
    if name == "is_routed_B":
        return "*i1"
    is_fp32 = name in IN_FP32 + OF_WEIGHTS or name.startswith("partial")
    return "*i32" if name == "ends_E" else "*fp32" if is_fp32 else "*bf16"

result = {}
for name, constants in CONSTANTS.items():
    program = next(getattr(m, name) for m in MODULES if hasattr(m, name))
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


#: Programs that read a few numbers a thread, or one here and one there.
COUNTING = {"count_choices", "place_choices", "place_choices_backward"}


@pytest.mark.parametrize(
    "capability",
    [90, *(pytest.param(other, marks=pytest.mark.combinations) for other in (80, 100))],
)
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
    assert len(found) == 22
    for name, counts in found.items():
        assert counts["instructions"] > 50, name
        assert counts["wide loads"] >= 1 or name in COUNTING, name
        assert counts["spills"] == 0, name
