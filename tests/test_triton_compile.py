"""The Triton kernels compiled, without a GPU, for three generations of them: what the machine code must look like."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter and the compiler cannot share a process", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from childtune_kernels.ops.triton import adamw, bits, fisher, gather, selection, squares, update  # noqa: E402

FP32, BF16, FP16 = tl.float32, tl.bfloat16, tl.float16
MASKINGS = {"plain": 0, "bernoulli": 1, "child": 2, "child-decay": 3, "compact": 4, "compact-bernoulli": 5}
ROUNDINGS = ("compensation", "master", "stochastic")
BLOCK_MAP = {
    "table": "*i64",
    "first_block": "*i32",
    "coarse": "*i32",
    "coarse_shift": "i32",
    "first_row": "i32",
    "n": "i32",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

BUDGET = 72  # registers a thread, measured: up to here the updates reach the copy bandwidth
CHILD_BUDGET = 40  # D waits for words before it loads, and lives from many programs at a time (54: 2.13 ms, 40: 1.99)


def build(kernel, signature, constants, capability, num_warps, tmp_path, aligned=(), num_stages=3, fused=False):
    """Compile a kernel, for arguments at 16-byte boundaries where named; return its PTX and its resource usage."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fused}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    report = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report.stdout)
    return compiled.asm["ptx"], dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


def assert_ieee(ptx):
    """No fused multiply-add and no approximation: the bit contract, read off the machine code.

    sm_80 adds bfloat16 by a multiply-add with 1 and multiplies by one with -0. These round once, as fp32 that is
    rounded after it does: sums because 24 bits are at least 2 * 8 + 2, products because they fit. They are left out.
    """
    ones, zeros = (set(re.findall(rf"mov\.b16\s+(%rs\d+), 0x{bits};", ptx)) for bits in ("3F80", "8000"))
    for alike, pair in ((ones, 0x3F803F80), (zeros, 0x80008000 - 2**32)):  # two at a time
        alike |= set(re.findall(rf"mov\.b32\s+(%r\d+), {pair};", ptx))

    def fused(match):
        *factors, added = match[1].split(", ")
        return "" if ones & {*factors} or added in zeros else match[0]

    ptx = re.sub(r"fma\.rn\.bf16(?:x2)?\s+%rs?\d+, (.*);", fused, ptx)
    assert not re.search(r"\bfma\.|\.approx|div\.full|\.ftz", ptx)


def assert_no_spills(usage, budget):
    assert (usage["stack"], usage["local"]) == (0, 0)
    assert usage["registers"] <= budget


# every combination of dtypes on one architecture, two or three on the others: the code differs by dtype, not by pairs
@pytest.mark.parametrize(
    "capability, param, state",
    [(90, FP32, FP32), (90, BF16, FP32), (90, FP16, FP32), (90, BF16, BF16), (90, FP32, BF16)]
    + [(c, p, FP32) for c in (80, 100) for p in (FP32, BF16)]
    + [(80, BF16, BF16)],
    ids=lambda x: f"sm_{x}" if isinstance(x, int) else str(x),
)
@pytest.mark.parametrize("masking", MASKINGS)
def test_update(masking, capability, param, state, tmp_path):
    check_update(masking, capability, param, state, tmp_path)


@pytest.mark.parametrize("companion, stochastic", [(1, False), (2, False), (0, True)], ids=ROUNDINGS)
@pytest.mark.parametrize("masking", [masking for masking in MASKINGS if "child" not in masking])
def test_update_of_low_precision_weights(masking, companion, stochastic, tmp_path):
    for capability, param in ((90, BF16), (90, FP16), (80, BF16), (100, BF16)):
        check_update(masking, capability, param, FP32, tmp_path, companion, stochastic)


def check_update(masking, capability, param, state, tmp_path, companion=0, stochastic=False):
    """Compile one combination; demand IEEE operations, no spills, few registers and wide accesses."""
    block, part, scalar_part, num_warps = update._sizes(MASKINGS[masking], bool(companion or stochastic))
    constants = dict(
        MASKING=MASKINGS[masking],
        COMPANION=companion,
        STOCHASTIC=stochastic,
        ADVANCE=adamw.advance,
        MOMENTS=2,
        PARAM_DTYPE=param,
        STATE_DTYPE=state,
        BLOCK=block,
        PART=part,
        SCALAR_PART=scalar_part,
    )
    signature = {**BLOCK_MAP, "scalars": "*i32"}
    ptx, usage = build(update._update_kernel, signature, constants, capability, num_warps, tmp_path)
    assert_ieee(ptx)
    assert_no_spills(usage, CHILD_BUDGET if "child" in masking else BUDGET)
    together = part // (32 * num_warps)  # elements of a thread, 4 of them at most in one access
    words = {min(4, together) * dtype.primitive_bitwidth // 32 for dtype in (param, state)}
    for width in {f"v{n}" for n in words if n > 1}:
        assert re.search(rf"ld\.global\.{width}\.b32", ptx)
        assert re.search(rf"st\.global\.{width}\.b32", ptx)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("scaler", [False, True], ids=["plain", "scaler"])
def test_begin(capability, scaler, tmp_path):
    signature = {"table": "*i64", "scalars": "*i32", "n": "i32"}
    scalars = dict.fromkeys(("grad_scale", "found_inf", "grad_norm"), "*fp32" if scaler else "constexpr")
    constants = dict(STEP_SIZE_OF=adamw.step_size, HAS_LRS=scaler, BLOCK=128) | (
        {} if scaler else dict.fromkeys(scalars)
    )
    ptx, usage = build(adamw.begin_kernel, signature | scalars, constants, capability, 4, tmp_path)
    assert_ieee(ptx)
    assert "div.rn.f64" in ptx and "sqrt.rn.f64" in ptx
    assert_no_spills(usage, 128)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("grad", [FP32, BF16], ids=str)
def test_square_accumulate(capability, grad, tmp_path):
    constants = dict(GRAD_DTYPE=grad, BLOCK=squares._BLOCK)
    signature = {**BLOCK_MAP, "scale": "fp32"}
    ptx, usage = build(squares._square_accumulate_kernel, signature, constants, capability, 4, tmp_path)
    assert_ieee(ptx)
    assert_no_spills(usage, BUDGET)
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("add", [False, True], ids=["set", "add"])
def test_gather(add, capability, tmp_path):
    constants = dict(ADD=add, DTYPE=BF16, BLOCK=gather._BLOCK)
    ptx, usage = build(gather._gather_kernel, BLOCK_MAP, constants, capability, 4, tmp_path)
    assert_no_spills(usage, BUDGET)
    assert "ld.global.v4.b32" in ptx  # the indices


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_bitmask(capability, tmp_path):
    block = {"BLOCK": bits._BLOCK}
    numbers = {"numel": "i64", "key": "i64", "step": "i32", "last_kept": "i32", "domain": "i32", "offset": "i64"}
    kernels = (
        (bits._bernoulli_bits_kernel, {"words": "*i32", **numbers}, block),
        (bits._popcount_kernel, {"words": "*i32", "count": "*i64", "n_words": "i64"}, block),
    )
    for kernel, signature, constants in kernels:
        ptx, usage = build(kernel, signature, constants, capability, 4, tmp_path)
        assert_no_spills(usage, 255)
    assert "popc.b32" in ptx


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_overlap(capability, tmp_path):
    signature = {"a": "*i32", "b": "*i32", "counts": "*i64", "n_words": "i64"}
    constants = {"BLOCK": bits._COUNT_BLOCK}
    kernel = bits._overlap_kernel
    ptx, usage = build(kernel, signature, constants, capability, 4, tmp_path, aligned=("a", "b"))
    assert_no_spills(usage, BUDGET)
    assert "popc.b32" in ptx and ptx.count("ld.global.v4.b32") == 2 * bits._COUNT_BLOCK // (128 * 4)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_selection(capability, dtype, tmp_path):
    count, pack = selection._count_kernel, selection._bits_kernel
    constants = dict(DTYPE=dtype)
    signature = {**BLOCK_MAP, "counts": "*i64", "shift": "i32", "n_bins": "i32"}
    sizes = dict(LANES=selection._LANES, STEPS=selection._STEPS)
    built = [build(count, signature, constants | sizes, capability, 4, tmp_path)]
    for lowest in (False, True):
        sizes = dict(LOWEST=lowest, BLOCK=selection._BLOCK)
        built.append(build(pack, BLOCK_MAP, constants | sizes, capability, 4, tmp_path))
    for ptx, usage in built:
        assert_no_spills(usage, 100)
        assert ("ld.global.v4.b32" if dtype == FP32 else "ld.global.v2.b32") in ptx
        assert not re.search(r"\.ftz", ptx)  # subnormal scores keep their order


FISHER_SIZES = dict.fromkeys(("examples", "positions", "n_rows", "n_columns", "d_example", "d_position"), "i32")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("d", [FP32, BF16], ids=str)
@pytest.mark.parametrize("kind", ["even", "masked", "unaligned"])
def test_fisher_linear(capability, d, kind, tmp_path):
    shared = {80: 166_912, 90: 232_448, 100: 232_448}[capability]  # bytes that a program may take
    dtype = torch.float32 if d == FP32 else torch.bfloat16
    for rows in (256, 4096):  # the small tile and the large one
        tile = fisher.tile(dtype, rows, 4096, 512, kind != "unaligned", 132, shared)
        constants = dict(
            EVEN=kind == "even", ROWS=tile.rows, COLUMNS=tile.columns, STEP=tile.step,
            BAND=fisher._BAND,
        )  # fmt: skip
        signature = {"total": "*fp32", "d": f"*{d}", "x": f"*{d}", "x_example": "i32", "x_position": "i32"}
        signature |= FISHER_SIZES
        divisible = () if kind == "unaligned" else set(signature) - {"examples", "positions"}
        options = dict(aligned=divisible, num_stages=tile.num_stages, fused=True)
        kernel = fisher._fisher_linear_kernel
        ptx, usage = build(kernel, signature, constants, capability, tile.num_warps, tmp_path, **options)
        assert_no_spills(usage, 255)
        assert tile.num_stages * tile.step * (tile.rows + tile.columns) * dtype.itemsize <= shared
        products = {FP32: "fma.rn", BF16: {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}[capability]}[d]
        assert products in ptx and "tf32" not in ptx
        assert kind == "unaligned" or "cp.async" in ptx


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("has", [False, True], ids=["alone", "factor"])
def test_fisher_columns(capability, has, tmp_path):
    given = {"plain_total": "*fp32", "factor": "*fp32"}
    signature = {"total": "*fp32", "d": "*bf16", "factor_example": "i32", "factor_position": "i32"} | FISHER_SIZES
    constants = dict(ROWS=128, COLUMNS=fisher._COLUMN_TILE)
    constants |= {} if has else dict.fromkeys(given)
    kernel = fisher._fisher_columns_kernel
    _, usage = build(kernel, signature | (given if has else {}), constants, capability, 4, tmp_path, fused=True)
    assert_no_spills(usage, 128)


def test_every_launch_states_fusion():
    """Triton's default differs from release to release: fused up to 3.9, not from 3.10 on."""
    launches = []
    for file in Path(update.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                stated = {ast.unparse(k.value) if k.arg is None else k.arg for k in node.keywords}
                launches.append((file.name, node.lineno, bool(stated & {"OPTIONS", "enable_fp_fusion"})))
    assert len(launches) >= 10
    assert not [launch for launch in launches if not launch[2]]
