"""What is csrc's own: every instruction set, threads, lists of every form at once, nvcc. Its bits: test_ops.py too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DTYPES, KINDS_OF_UPDATE, Case, unchanged
from oracles import same_bits

from childtune_kernels import ops, philox
from childtune_kernels.ops import csrc, reference
from childtune_kernels.ops.tensors import TensorList

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent
REASON = ops.unavailable("csrc", "cpu")
if REASON and os.environ.get("CHILDTUNE_REQUIRE_CSRC") == "1":
    raise RuntimeError(f"CHILDTUNE_REQUIRE_CSRC=1, but {REASON}")
needs_csrc = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SIZES = (0, 1, 3, 4, 5, 31, 32, 33, 0, 63, 64, 65, 1023, 1024, 1025, 35001, 0)  # 35001 is enough for two threads
SHAPES = ((37, 113), *((size,) for size in SIZES))
CPU = torch.device("cpu")
LOW = {name: kind for name, kind in KINDS_OF_UPDATE.items() if not kind.words}


def run(kernels, kind, *, share=None, steps=2, **kwargs) -> Case:
    """Take steps from inputs that depend on the arguments alone, every tensor at another step of its training.

    Args:
        share: of the weights in the child network, where there are mask words.
    """
    case = Case("cpu", kind, shapes=SHAPES, **kwargs)
    for i, step in enumerate(case.steps):
        step.fill_(10 * i)
    if share is not None:
        children = [torch.rand(shape, generator=case.generator) < share for shape, _ in case.specs]
        case.update.mask_words = TensorList(ops.pack_bits(child) for child in children)
    for _ in range(steps):
        # half of the gradients, where the kind allows it, lie packed
        grads = [case.guards.place(case.packed(i, g), i % 5) if i % 2 else g for i, g in enumerate(case.new_grads())]
        case.update.grads = TensorList(grads)
        kernels.update_(case.update)
    return case


def assert_same(a: Case, b: Case) -> None:
    for name, xs, ys in zip(("param", "exp_avg", "exp_avg_sq", "step", "companion"), a.update.written,
                            b.update.written, strict=True):  # fmt: skip
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            assert same_bits(x, y), f"{name} {i} of {a.specs[i]}"
    assert a.guards.intact() and b.guards.intact()


@needs_csrc
@pytest.mark.parametrize("moment_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS_OF_UPDATE)
def test_updates_equal_reference(kind, moment_dtype):
    of_kind = KINDS_OF_UPDATE[kind]
    assert_same(*(run(kernels, of_kind, moment_dtype=moment_dtype) for kernels in (csrc, reference)))


@needs_csrc
@pytest.mark.parametrize("rounding", ["master", "compensation", "stochastic"])
@pytest.mark.parametrize("kind", LOW)
def test_low_precision_updates_equal_reference(kind, rounding):
    assert_same(*(run(kernels, LOW[kind], rounding=rounding) for kernels in (csrc, reference)))


@needs_csrc
@pytest.mark.parametrize("kind", KINDS_OF_UPDATE)
def test_lists_may_mix_dtypes_of_moments(kind):
    both = []
    for kernels in (csrc, reference):
        parts = [Case("cpu", KINDS_OF_UPDATE[kind], shapes=SHAPES[-4:], moment_dtype=dtype) for dtype in DTYPES]
        for part in parts:
            part.update.grads = TensorList(part.new_grads())
        names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "indices", "mask_words", "mask_keys")
        lists = {name: sum((list(getattr(part.update, name)) for part in parts), []) for name in names}
        update = ops.Update(**lists, hyper=torch.cat([part.hyper for part in parts]))
        update.check()
        kernels.update_(update)
        assert all(part.guards.intact() for part in parts)
        both.append([t for tensors in update.written for t in tensors])
    assert unchanged(*both)


@needs_csrc
@pytest.mark.parametrize("share", (0.0, 0.001, 1.0))
@pytest.mark.parametrize("kind", ("child", "child, decay all"))
def test_a_child_of_few_words_or_of_all(kind, share):
    """Whole words are passed over."""
    assert_same(*(run(kernels, KINDS_OF_UPDATE[kind], share=share) for kernels in (csrc, reference)))


@needs_csrc
@pytest.mark.parametrize("kind", KINDS_OF_UPDATE)
def test_updates_do_not_depend_on_the_thread_count(kind):
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(csrc, KINDS_OF_UPDATE[kind], rounding="nearest" if kind not in LOW else "stochastic"))
    for other in results[1:]:
        assert_same(other, results[0])


@needs_csrc
def test_no_tensors():
    """An overload is dispatched by its table alone, and has nothing to do."""
    torch.ops.childtune.adamw_.csrc(
        *([] for _ in range(5)), torch.empty(0, len(ops.HYPER_COLUMNS), dtype=torch.float64), *([] for _ in range(6))
    )


@needs_csrc
@pytest.mark.parametrize("threads", (1, 2, 5))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_square_accumulate(dtype, threads):
    torch.set_num_threads(threads)
    case = Case("cpu", shapes=SHAPES, dtypes=(dtype,))
    grads = case.new_grads()
    starts = [torch.rand(shape, generator=case.generator) for shape, _ in case.specs]
    actual, expected = ([case.guards.place(x, i % 3) for i, x in enumerate(starts)] for _ in range(2))
    for scale in (1.0, 0.1):
        csrc.square_accumulate_(actual, grads, scale)
        reference.square_accumulate_(expected, grads, scale)
    assert unchanged(actual, expected) and case.guards.intact()


@needs_csrc
@pytest.mark.parametrize("offset", (0, 4, 2**34 - 64, 2**34 + 12, 2**61))
@pytest.mark.parametrize("p", (2**-32, 0.3, 1.0))
def test_bernoulli_bits(offset, p):
    for threads, numels in ((1, (0, 1, 31, 32, 33, 255, 256, 257, 70001)), (3, (70001,))):
        torch.set_num_threads(threads)
        for numel in numels:
            arguments = (numel, philox.stream_key(9, "w"), 2**32 - 1, p, philox.RANDOM_CHILD, offset, CPU)
            assert torch.equal(csrc.bernoulli_bits(*arguments), reference.bernoulli_bits(*arguments)), numel


@needs_csrc
@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_and_popcount_bits(dtype, threads):
    torch.set_num_threads(threads)
    for numel in (0, 1, 31, 32, 33, 70001):
        scores = torch.randint(-4, 5, (numel,), generator=torch.Generator().manual_seed(3)).to(dtype)
        scores[::7] = float("nan")
        for threshold in (1.0, 1.0001, -float("inf"), float("inf"), float("nan")):
            expected = reference.threshold_bits([scores], [threshold], [numel])
            words = csrc.threshold_bits([scores], [threshold], [numel], False)
            assert torch.equal(words, expected), (numel, threshold)
            count = csrc.popcount_bits(words)
            assert count.dtype == torch.int64 and count.shape == () and count == reference.popcount_bits(expected)


@needs_csrc
@pytest.mark.parametrize("threads", (1, 2, 5))
def test_overlap_bits(threads):
    torch.set_num_threads(threads)
    for n_words in (0, 1, 33, 1025, 100_003):
        words = torch.randint(-(2**31), 2**31, (2, n_words), generator=torch.Generator().manual_seed(n_words))
        a, b = words.to(torch.int32)
        assert torch.equal(csrc.overlap_bits(a, b), reference.overlap_bits(a, b)), n_words


@needs_csrc
@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_score_histogram(dtype, threads):
    torch.set_num_threads(threads)
    scores = Case("cpu", shapes=SHAPES, dtypes=(dtype,)).params
    scores[0].view(-1)[:6] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-42]).to(dtype)
    for shift, digits in ((21, 11), (16, 8), (28, 4), (31, 1), (0, 0)):
        firsts = [(0x3F000000 + 0x01234567 * i) % (2**32 - 2 ** (shift + digits) + 1) for i in range(len(scores))]
        expected = reference.score_histogram(scores, firsts, shift, digits)
        assert torch.equal(csrc.score_histogram(scores, firsts, shift, digits), expected)


@needs_csrc
@pytest.mark.parametrize("capability", ("portable", "avx2"))
def test_every_instruction_set(capability):
    """The widest set runs in this process; the others, chosen when the library first needs one, in their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, f"{ROOT}/tests/test_ops.py"]
    command += ["-k", "csrc-cpu or (test_csrc.py and not instruction_set and not cuda_sources)"]
    environment = os.environ | {"CHILDTUNE_CPU_CAPABILITY": capability, "CHILDTUNE_REQUIRE_CSRC": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]


NVCC = shutil.which("nvcc")


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", ("update", "bitmask", "fisher", "selection"))
def test_cuda_sources_compile_without_spills(source, tmp_path):
    include = Path(torch.__file__).parent / "include"
    command = [NVCC, "-c", f"{ROOT}/csrc/cuda/{source}.cu", "-o", f"{tmp_path}/{source}.o", f"-I{include}"]
    command += [
        "-std=c++17",
        "-O3",
        "-fmad=false",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "--resource-usage",
    ]
    command += ["-gencode=arch=compute_90,code=sm_90"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    frames = [line for line in done.stderr.splitlines() if "spill" in line]
    assert frames and all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in frames)


def test_an_unbuilt_device_says_why():
    assert csrc.unavailable("mps") and (csrc.unavailable("cpu") is None or "build" in csrc.unavailable("cpu"))
    if torch.version.cuda is None:
        assert csrc.unavailable("cuda") == "this torch is built without CUDA"
