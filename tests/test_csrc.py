"""csrc: bitwise equal to the reference on CPU, in every instruction set; strict about arguments; clean under nvcc."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from childtune_kernels import philox
from childtune_kernels.ops import csrc, implementation, reference, square_accumulate_, unavailable

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent
REASON = unavailable("csrc", "cpu")
if REASON and os.environ.get("CHILDTUNE_REQUIRE_CSRC") == "1":
    raise RuntimeError(f"CHILDTUNE_REQUIRE_CSRC=1, but {REASON}")
needs_csrc = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 3, 4, 5, 31, 32, 33, 0, 63, 64, 65, 1023, 1024, 1025, 35001, 0)  # 35001 is enough for two threads
SHAPES = ((37, 113), *((size,) for size in SIZES))
GUARD = 64  # sentinel elements on either side of a misaligned view
CPU = torch.device("cpu")


def offset_view(values: torch.Tensor, shift: int) -> torch.Tensor:
    """Copy values into a sentinel buffer, ``shift`` elements off its alignment."""
    buffer = torch.full((values.numel() + 2 * GUARD,), 7.0).to(values.dtype)
    view = buffer[GUARD + shift :][: values.numel()].view(values.shape)
    view.copy_(values)
    return view


def assert_sentinels(view: torch.Tensor) -> None:
    buffer = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())
    start = view.storage_offset()
    assert (buffer[:start] == 7).all() and (buffer[start + view.numel() :] == 7).all()


def make_lists(weight_dtype, moment_dtype, *, shapes=SHAPES, p=0.3, max_grad_norm=float("inf")):
    """Return params, grads, exp_avgs, exp_avg_sqs, steps and hyper; every hyper-parameter differs between tensors."""
    generator = torch.Generator().manual_seed(0)
    lists = ([], [], [], [])
    for i, shape in enumerate(shapes):
        w, g, m = (torch.randn(shape, generator=generator) for _ in range(3))
        values = (w, 0.1 * g, 0.01 * m, 0.001 * torch.rand(shape, generator=generator))
        dtypes, shifts = (weight_dtype, weight_dtype, moment_dtype, moment_dtype), (i % 2, i % 5, 0, i % 3)
        for tensors, value, dtype, shift in zip(lists, values, dtypes, shifts, strict=True):
            tensors.append(offset_view(value.to(dtype), shift))
    steps = [torch.tensor(float(10 * i), dtype=torch.float64) for i in range(len(shapes))]
    rows = []
    for i in range(len(shapes)):
        lr, betas, decay, sign = 1e-3 * (i + 1), (0.9 - 0.01 * i, 0.999 - 0.01 * i), 0.01 * (i % 3), (-1.0) ** (i // 2)
        rows.append([lr, *betas, 1e-8, decay, p, sign, i % 2, max_grad_norm])
    return [*lists, steps, torch.tensor(rows, dtype=torch.float64).view(len(shapes), 9)]


def clone(lists):
    """Copy lists of tensors, keeping every view's misalignment."""

    def copy(tensor):
        storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage().clone())
        return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return [[copy(t) for t in x] if isinstance(x, list) else x.clone() for x in lists]


def extra_arguments(op: str, shapes, share=0.1):
    if op == "adamw_":
        return ([], [])
    if op == "adamw_bernoulli_":
        return ([philox.stream_key(2**63 + 5, f"layer.{i}") for i in range(len(shapes))], [], [])
    if op == "adamw_masked_":
        generator = torch.Generator().manual_seed(1)
        masks = [reference.pack_bits(torch.rand(shape, generator=generator) < share) for shape in shapes]
        return ([torch.empty(0, dtype=torch.int32) if i % 4 == 3 else mask for i, mask in enumerate(masks)],)
    return ()


def assert_same(actual, expected) -> None:
    for name, xs, ys in zip(("param", "grad", "exp_avg", "exp_avg_sq", "step"), actual, expected, strict=False):
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            assert torch.equal(x, y), f"{name}[{i}] of shape {tuple(x.shape)}, {x.dtype}"
            if name != "step":
                assert_sentinels(x)


def compare_update(op, lists, extra, *options, updates=2):
    expected, actual = clone(lists), clone(lists)
    for _ in range(updates):
        getattr(reference, op)(*expected, *extra, *options)
        getattr(implementation("csrc", "cpu"), op)(*actual, *extra, *options)
    assert_same(actual, expected)
    return actual


UPDATES = ("adamw_", "adamw_bernoulli_", "adamw_masked_")


@needs_csrc
@pytest.mark.parametrize("op", UPDATES)
@pytest.mark.parametrize("moment_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_updates_equal_reference(op, weight_dtype, moment_dtype):
    lists = make_lists(weight_dtype, moment_dtype)
    extra = extra_arguments(op, SHAPES)
    for tail in ((False,), (True,)) if op == "adamw_masked_" else ((),):
        compare_update(op, lists, (*extra, *tail), [], updates=3)


@needs_csrc
@pytest.mark.parametrize("rounding", ["nearest", "master", "compensation", "stochastic"])
@pytest.mark.parametrize("p", [1.0, 0.3])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_compact_updates_equal_reference(weight_dtype, p, rounding):
    """Index lists of every density, some tensors whole and some gradients packed, in every way to keep weights."""
    params, grads, exp_avgs, exp_avg_sqs, steps, hyper = make_lists(weight_dtype, torch.float32, p=p)
    generator = torch.Generator().manual_seed(1)
    indices, companions = [], []
    for i, param in enumerate(params):
        bits = torch.rand(param.numel(), generator=generator) < (0.0, 0.1, 0.6, 1.0)[i % 4]
        index = bits.nonzero().flatten().int()
        if i % 5 == 3:  # the whole tensor
            index = index[:0]
        else:
            exp_avgs[i], exp_avg_sqs[i] = (
                offset_view(m.reshape(-1)[bits], i % 3) for m in (exp_avgs[i], exp_avg_sqs[i])
            )
            if i % 2:
                grads[i] = offset_view(grads[i].reshape(-1)[bits], i % 5)
        indices.append(index)
        held = param.float() if rounding == "master" else torch.zeros(param.shape).to(weight_dtype)
        held = held if exp_avgs[i].shape == param.shape else held.reshape(-1)[index.long()]
        companions.append(held if weight_dtype != torch.float32 else torch.empty(0))
    keys = [philox.stream_key(5, str(i)) for i in range(len(params))]
    lists = [params, grads, exp_avgs, exp_avg_sqs, steps, hyper]
    beside = companions if rounding in ("master", "compensation") else []
    both = clone([*lists, beside]), clone([*lists, beside])
    for _ in range(2):
        for kernels, (*own, held) in zip((reference, implementation("csrc", "cpu")), both, strict=True):
            kernels.adamw_compact_(*own, indices, keys, held, keys if rounding == "stochastic" else [], [])
    assert_same(both[1], both[0])
    assert all(torch.equal(a, b) for a, b in zip(both[0][-1], both[1][-1], strict=True))


@needs_csrc
@pytest.mark.parametrize("op", UPDATES)
def test_lists_may_mix_dtypes(op):
    shapes = SHAPES[-4:]
    parts = [make_lists(w, m, shapes=shapes) for w, m in zip(DTYPES, reversed(DTYPES), strict=True)]
    lists = [sum(x, []) for x in list(zip(*parts, strict=True))[:5]] + [torch.cat([part[5] for part in parts])]
    extra = extra_arguments(op, shapes * 3) + ((False,) if op == "adamw_masked_" else ())
    compare_update(op, lists, extra, [])


@needs_csrc
@pytest.mark.parametrize("p", (2**-32, 0.3, 1 - 2**-20, 1.0))
def test_bernoulli_keeps_the_share(p):
    lists = make_lists(torch.float32, torch.float32, p=p)
    compare_update("adamw_bernoulli_", lists, extra_arguments("adamw_bernoulli_", SHAPES), [])


@needs_csrc
@pytest.mark.parametrize("excess", (0, 1), ids=("dropped", "kept"))
def test_bernoulli_boundary_is_exact(excess):
    """A word is kept if it is below floor(p * 2**32), not if it equals it."""
    key, element, step = 12345, 70, 1
    counter = tuple(torch.tensor([c]) for c in (element // 4, 0, step, philox.GRADIENT_MASK))
    word = int(philox.philox4x32_10(counter, (key, 0))[element % 4])
    p = (word + excess) / 2**32
    bits = implementation("csrc", "cpu").bernoulli_bits(100, key, step, p, philox.GRADIENT_MASK, 0, CPU)
    assert reference.unpack_bits(bits, 100)[element] == bool(excess)
    lists = make_lists(torch.float32, torch.float32, shapes=((100,),), p=p)
    compare_update("adamw_bernoulli_", lists, ([key], [], []), [], updates=1)


@needs_csrc
@pytest.mark.parametrize("share", (0.0, 0.001, 1.0))
def test_masked_leaves_the_rest_bitwise_alone(share):
    lists = make_lists(torch.float32, torch.bfloat16)
    (masks,) = extra_arguments("adamw_masked_", SHAPES, share)
    actual = compare_update("adamw_masked_", lists, (masks, False), [])
    for before, after, words in zip(lists[0], actual[0], masks, strict=True):
        outside = ~reference.unpack_bits(words, before.numel()) if words.numel() else torch.zeros(before.numel()).bool()
        assert torch.equal(before.reshape(-1)[outside], after.reshape(-1)[outside])


@needs_csrc
@pytest.mark.parametrize("op", UPDATES)
@pytest.mark.parametrize("found_inf", (None, 0.0, 1.0, 2.0))
def test_scaled_clipped_gradients_and_overflow(op, found_inf):
    lists = make_lists(torch.float32, torch.float32, max_grad_norm=0.5)
    extra = extra_arguments(op, SHAPES) + ((True,) if op == "adamw_masked_" else ())
    lrs = [torch.tensor(0.01 * (i + 1)) for i in range(len(SHAPES))]
    flag = None if found_inf is None else torch.tensor(found_inf)
    for norm in (0.0, 3.0, 1e6, float("inf")):
        actual = compare_update(op, lists, extra, lrs, torch.tensor(1024.0), flag, torch.tensor(norm))
        if found_inf:
            assert_same(actual, lists)


@needs_csrc
def test_a_nan_norm_poisons_every_child_weight():
    lists = make_lists(torch.float32, torch.float32, shapes=((5,),), max_grad_norm=1.0)
    implementation("csrc", "cpu").adamw_(*lists, [], [], [], None, None, torch.tensor(float("nan")))
    assert lists[0][0].isnan().all()


@needs_csrc
@pytest.mark.parametrize("op", UPDATES)
def test_no_tensors(op):
    extra = {"adamw_": ([], []), "adamw_bernoulli_": ([], [], []), "adamw_masked_": ([], False)}[op]
    getattr(implementation("csrc", "cpu"), op)([], [], [], [], [], torch.empty(0, 9, dtype=torch.float64), *extra, [])


@needs_csrc
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_square_accumulate(dtype):
    grads = make_lists(dtype, torch.float32)[1]
    expected = [offset_view(torch.rand(shape), i % 3) for i, shape in enumerate(SHAPES)]
    (actual,) = clone([expected])
    for scale in (1.0, 0.1):
        reference.square_accumulate_(expected, grads, scale)
        implementation("csrc", "cpu").square_accumulate_(actual, grads, scale)
    assert_same([actual], [expected])
    square_accumulate_([], [], 1.0)  # of the checked op: an overload has no device to go by


@needs_csrc
@pytest.mark.parametrize("offset", (0, 4, 2**34 - 64, 2**34 + 12, 2**61))
@pytest.mark.parametrize("p", (2**-32, 0.3, 1.0))
def test_bernoulli_bits(offset, p):
    draw = implementation("csrc", "cpu").bernoulli_bits
    for numel in (0, 1, 31, 32, 33, 255, 256, 257, 70001):
        arguments = (numel, philox.stream_key(9, "w"), 2**32 - 1, p, philox.RANDOM_CHILD, offset, CPU)
        assert torch.equal(draw(*arguments), reference.bernoulli_bits(*arguments)), numel


@needs_csrc
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_and_popcount_bits(dtype):
    functions = implementation("csrc", "cpu")
    for numel in (0, 1, 31, 32, 33, 70001):
        scores = torch.randint(-4, 5, (numel,), generator=torch.Generator().manual_seed(3)).to(dtype)
        scores[::7] = float("nan")
        for threshold in (1.0, 1.0001, -float("inf"), float("inf"), float("nan")):
            expected = reference.threshold_bits([scores], [threshold], [numel])
            words = functions.threshold_bits([scores], [threshold], [numel], False)
            assert torch.equal(words, expected), (numel, threshold)
            count = functions.popcount_bits(words)
            assert count.dtype == torch.int64 and count.shape == () and count == reference.popcount_bits(expected)


@needs_csrc
@pytest.mark.parametrize("threads", (1, 2, 5))
def test_overlap_bits(threads):
    torch.set_num_threads(threads)
    for n_words in (0, 1, 33, 1025, 100_003):
        words = torch.randint(-(2**31), 2**31, (2, n_words), generator=torch.Generator().manual_seed(n_words))
        a, b = words.to(torch.int32)
        counts = implementation("csrc", "cpu").overlap_bits(a, b)
        assert torch.equal(counts, reference.overlap_bits(a, b)), n_words


@needs_csrc
@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_score_histogram(dtype, threads):
    torch.set_num_threads(threads)
    scores = make_lists(dtype, torch.float32)[0]
    scores[0].view(-1)[:6] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-42]).to(dtype)
    for shift, digits in ((21, 11), (16, 8), (28, 4), (31, 1), (0, 0)):
        firsts = [(0x3F000000 + 0x01234567 * i) % (2**32 - 2 ** (shift + digits) + 1) for i in range(len(scores))]
        expected = reference.score_histogram(scores, firsts, shift, digits)
        assert torch.equal(implementation("csrc", "cpu").score_histogram(scores, firsts, shift, digits), expected)


@needs_csrc
def test_results_do_not_depend_on_the_thread_count():
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        lists = make_lists(torch.float32, torch.float32)
        implementation("csrc", "cpu").adamw_bernoulli_(*lists, *extra_arguments("adamw_bernoulli_", SHAPES), [])
        results.append(lists)
    for other in results[1:]:
        assert_same(other, results[0])


@needs_csrc
@pytest.mark.parametrize("capability", ("portable", "avx2"))
def test_every_instruction_set(capability):
    """The widest set runs in this process; the others, chosen when the library first needs one, in their own."""
    tests = "updates_equal_reference or bernoulli or masked_leaves or mix_dtypes"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", tests]
    environment = os.environ | {"CHILDTUNE_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]


NVCC = shutil.which("nvcc")


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", ("adamw", "bitmask", "fisher", "selection"))
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
