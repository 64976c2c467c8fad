"""The update ops: every implementation does, bit for bit, what the written order of operations says."""

from __future__ import annotations

import math
import operator

import pytest
import torch
from cases import BERNOULLI, BLOCK, COMPACT, DTYPES, KINDS_OF_UPDATE, SHAPES, Case, hyper_row
from oracles import Judge, assert_as_accurate, neighbours, same_bits

from childtune_kernels import ops, philox


@pytest.fixture(params=KINDS_OF_UPDATE, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def update(request):
    return KINDS_OF_UPDATE[request.param]


@pytest.mark.parametrize("moment_dtype", DTYPES, ids=["m32", "mbf16", "m16"])
def test_bits_over_sizes_dtypes_and_steps(update, dialect, moment_dtype, place):
    case = Case(place.device, update, moment_dtype=moment_dtype, dialect=dialect)
    for _ in range(4):
        case.step(place.kernels, case.new_grads())
        case.check()


ROUNDINGS = ("master", "compensation", "stochastic")
LOW = {name: kind for name, kind in KINDS_OF_UPDATE.items() if not kind.words}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("update", LOW.values(), ids=LOW)
def test_bits_of_low_precision_weights(update, rounding, dialect, place):
    case = Case(place.device, update, dialect=dialect, rounding=rounding)
    for _ in range(4):
        case.step(place.kernels, case.new_grads())
        case.check()
    case.step(place.kernels, case.new_grads(special=math.inf), found_inf=1.0)
    case.check()


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("update", LOW.values(), ids=LOW)
def test_bits_of_low_precision_weights_at_every_alignment(update, offset, rounding, place):
    shapes, dtypes = ((BLOCK,), (3 * BLOCK + 5,)), (torch.bfloat16, torch.float16)
    case = Case(place.device, update, shapes=shapes, dtypes=dtypes, offset=offset, rounding=rounding)
    for _ in range(2):
        case.step(place.kernels, case.new_grads())
        case.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_stochastic_rounding_goes_to_a_neighbour_and_is_right_on_average(dtype, place):
    """With betas of 0 and a gradient of 0 the weight is only rounded; here it decays to values of every kind."""
    tiny = torch.finfo(dtype).smallest_normal
    targets = torch.tensor([1.0, 1.003, -0.7001, 3e-3, tiny * 1.37, -tiny / 3, tiny / 2048, 50000.0])
    weights = (targets / 0.9).to(dtype)
    exact = weights.float() + torch.tensor(-0.1) * weights.float()
    n = 4096
    param = weights[:, None].expand(-1, n).contiguous().to(place.device)
    zeros = [torch.zeros(param.shape, device=place.device) for _ in range(2)]
    row = hyper_row(lr=1.0, beta1=0.0, beta2=0.0, eps=1.0, weight_decay=0.1)
    hyper = torch.tensor([row], dtype=torch.float64)
    step = torch.zeros((), dtype=torch.float64, device=place.device)
    key = philox.stream_key(3, "w")
    grads = [torch.zeros_like(param)]
    place.kernels.update_(ops.Update([param], grads, zeros[:1], zeros[1:], [step], hyper, rounding_keys=[key]))
    got = param.cpu().double()
    below, above = (x.double()[:, None] for x in neighbours(exact, dtype))
    assert ((got == below) | (got == above)).all()
    distance, unit = exact.double() - got.mean(1), (above - below).abs().flatten()
    assert (distance.abs() <= 5 * 0.5 * unit / math.sqrt(n) + unit * 2.0**-13).all()
    inexact = unit > 0
    assert inexact[1:6].all() and ((got == above).any(1) & (got == below).any(1))[1:6].all()


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan], ids=str)
def test_stochastic_rounding_of_what_is_not_finite(special, place):
    case = Case(place.device, shapes=((33,),), dtypes=(torch.bfloat16, torch.float16), rounding="stochastic")
    case.step(place.kernels, case.new_grads(special=special))
    case.check()


@pytest.mark.parametrize("lr_list", [False, True], ids=["hyper-lr", "lrs"])
@pytest.mark.parametrize("scale", [None, 1024.0, 3.0])
@pytest.mark.parametrize("norm", [None, 0.5, 50.0, 0.0, math.inf, math.nan], ids=str)
def test_bits_with_scaling_clipping_and_ascent(update, norm, scale, lr_list, place):
    shapes = ((33,), (BLOCK + 1,), (37, 29))
    case = Case(place.device, update, shapes=shapes, lr_list=lr_list, sign=-1.0, max_grad_norm=1.5)
    for _ in range(2):
        stored_norm = None if norm is None else norm * (scale or 1.0)
        case.step(place.kernels, case.new_grads(scale=scale or 1.0), scale=scale, norm=stored_norm)
        case.check()


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-42, 3e38], ids=str)
def test_bits_of_special_gradients(update, special, place):
    case = Case(place.device, update, shapes=((33,), (BLOCK + 1,)), dtypes=(torch.float32, torch.bfloat16))
    for _ in range(2):
        case.step(place.kernels, case.new_grads(special=special))
        case.check()


@pytest.mark.parametrize("found_inf", [1.0, 2.0, math.nan])
def test_found_inf_writes_nothing_and_the_retry_is_the_same_step(update, found_inf, place):
    case = Case(place.device, update)
    case.step(place.kernels, case.new_grads(), scale=8.0, found_inf=0.0)
    case.check()
    case.step(place.kernels, case.new_grads(special=math.inf), scale=8.0, found_inf=found_inf)
    case.check()
    case.step(place.kernels, case.new_grads(), scale=4.0, found_inf=0.0)
    case.check()


EMPTY = {
    "first": ((0,), (5,), (BLOCK + 1,)),
    "middle": ((5,), (0, 3), (BLOCK + 1,)),
    "last": ((5,), (BLOCK + 1,), (0,)),
    "all": ((0,), (2, 0)),
    "runs": ((0,), (0,), (33,), (0,), (0,), (31,), (0,), (0,)),
}


@pytest.mark.parametrize("shapes", EMPTY.values(), ids=EMPTY)
def test_bits_with_empty_tensors(update, shapes, place):
    case = Case(place.device, update, shapes=shapes)
    for _ in range(2):
        case.step(place.kernels, case.new_grads())
        case.check()


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 5, 8])
def test_bits_at_every_alignment(update, offset, place):
    """Gradients, weights and moments at unequal element offsets; 0: all as the allocator aligns them."""
    case = Case(place.device, update, shapes=((BLOCK,), (3 * BLOCK + 5,)), offset=offset)
    for _ in range(2):
        case.step(place.kernels, case.new_grads())
        case.check()


def test_bits_of_a_large_list(update, place):
    """150 tensors of a few elements beside three of many blocks."""
    case = Case(place.device, update, shapes=((20_003,), *((n % 7,) for n in range(50))))
    case.step(place.kernels, case.new_grads())
    case.check()


@pytest.mark.parametrize("first_step", [1, 2, 15, 255, 256, 257, 2**24 - 3])
def test_bits_late_in_training(update, first_step, place):
    case = Case(place.device, update, shapes=((33,), (37, 29)))
    for step in case.steps:
        step.fill_(first_step - 1)
    case.t = first_step - 1
    for _ in range(2):
        case.step(place.kernels, case.new_grads())
        case.check()


@pytest.mark.parametrize("p", [2.0**-32, 1e-9, 0.1, 0.5, 1 - 2.0**-33, 1.0])
def test_bits_of_bernoulli_at_extreme_p(p, place):
    case = Case(place.device, BERNOULLI, shapes=((BLOCK + 1,),), reserve_p=p)
    for _ in range(2):
        case.step(place.kernels, case.new_grads())
        case.check()


@pytest.mark.parametrize("shares", [(1.0, 1.0, 0.3), (0.3, 1.0, 1.0), (1.0, 0.3, 1.0)], ids=str)
@pytest.mark.parametrize("kind", [BERNOULLI, COMPACT], ids=["bernoulli", "compact"])
def test_bits_where_f_samples_some_parameters_alone(kind, shares, place):
    case = Case(place.device, kind._replace(p=shares), shapes=((33,), (7, 5), (65,)), dtypes=(torch.float32,))
    for _ in range(2):
        case.step(place.kernels, case.new_grads())
        case.check()


def test_each_row_says_whether_its_weights_outside_the_child_decay(dialect, place):
    """By a tenth a step, which weights of every dtype show."""
    kind, shapes = KINDS_OF_UPDATE["child, decay some"], ((33,), (BLOCK + 1,), (37, 29))
    case = Case(place.device, kind, shapes=shapes, shares=(0.4,), lr=0.1, weight_decay=1.0, dialect=dialect)
    before = [param.cpu().clone() for param in case.params]
    case.step(place.kernels, case.new_grads())
    case.check()
    moved = [bool((a != b.cpu())[~child].any()) for a, b, child in zip(before, case.params, case.children, strict=True)]
    whole = [not words.numel() for words in case.words]
    assert moved == [i % 3 == 0 and not whole[i] for i in range(9)] and sum(moved) == 3


def test_p_of_one_is_plain_adamw(place):
    plain, bernoulli = Case(place.device), Case(place.device, BERNOULLI._replace(p=(1.0,)))
    for _ in range(3):
        plain.step(place.kernels, plain.new_grads())
        bernoulli.step(place.kernels, bernoulli.new_grads())
    assert all(same_bits(a, b) for a, b in zip(plain.params, bernoulli.params, strict=True))


@pytest.mark.parametrize("moment_dtype", DTYPES, ids=["m32", "mbf16", "m16"])
def test_accuracy_against_fp64(update, dialect, dtype, moment_dtype, place):
    n, steps, p = 700, 30, update.p[-1]
    hyper = dict(dialect=dialect, reserve_p=p, weight_decay=0.1)
    case = Case(
        place.device, update, shapes=((n,),), dtypes=(dtype,), moment_dtype=moment_dtype, shares=(0.4,), **hyper
    )
    judge = Judge(case.params[0], moment_dtype)
    lr, beta1, beta2, eps, weight_decay = case.rows[0][:5]
    for t in range(1, steps + 1):
        grads = case.new_grads()
        case.step(place.kernels, grads)
        masks = {}
        if p < 1:
            masks.update(keep=philox.keep_bits(torch.arange(n), case.keys[0], t, p), p=p)
        if update.words or update.indices:
            everywhere = update.words and update.decay_outside[0]
            masks.update(child=case.children[0], decay="all" if everywhere else "child")
        adamw = dict(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, dialect=dialect)
        judge.step(grads[0], **adamw, **masks)
    moments = [case.exp_avgs[0].cpu(), case.exp_avg_sqs[0].cpu()]
    if update.indices:  # outside the child they are zero for ever
        moments = [torch.zeros(n, dtype=moment_dtype).masked_scatter(case.children[0], packed) for packed in moments]
    judge.check(case.params[0], *moments)


@pytest.mark.parametrize("add", [False, True])
def test_gather_child(add, place):
    case = Case(place.device, COMPACT)
    rows = [i for i, index in enumerate(case.indices) if index.numel() or not case.exp_avgs[i].numel()]
    for _ in range(2):
        grads = [case.new_grads()[i] for i in rows]
        packed = [case.guards.place(torch.randn(case.indices[i].shape, device=place.device).to(g.dtype), i % 3)
                  for i, g in zip(rows, grads, strict=True)]  # fmt: skip
        expected = [g.cpu()[case.children[i]] for i, g in zip(rows, grads, strict=True)]
        if add:
            expected = [(p.cpu().float() + e.float()).to(e.dtype) for p, e in zip(packed, expected, strict=True)]
        place.kernels.gather_child_(packed, grads, [case.indices[i] for i in rows], add)
        assert all(same_bits(p, e) for p, e in zip(packed, expected, strict=True))
        assert case.guards.intact()


@pytest.mark.parametrize("scale", [1.0, 0.125, 1 / 3])
def test_square_accumulate_bits(scale, place):
    case = Case(place.device)
    shapes = [g.shape for g in case.new_grads()]
    accumulators = [case.guards.place(torch.rand(shape, device=place.device), i % 3) for i, shape in enumerate(shapes)]
    expected = [a.cpu().numpy().copy() for a in accumulators]
    for _ in range(3):
        grads = case.new_grads()
        place.kernels.square_accumulate_(accumulators, grads, scale)
        for i, g in enumerate(g.float().cpu().numpy() for g in grads):
            expected[i] = expected[i] + (g * g) * torch.tensor(scale).numpy()
    for got, want, shape in zip(accumulators, expected, shapes, strict=True):
        assert same_bits(got, torch.as_tensor(want).view(shape))
    assert case.guards.intact()


def test_square_accumulate_against_fp64(place):
    grads = [torch.randn(301, device=place.device) for _ in range(50)]
    total = torch.zeros(301, device=place.device)
    for grad in grads:
        place.kernels.square_accumulate_([total], [grad], 1 / 50)
    truth = sum(g.double() ** 2 for g in grads) / 50
    assert_as_accurate(total, truth, sum(g**2 * (1 / 50) for g in grads))


@pytest.mark.parametrize("numel", [s[0] for s in SHAPES if len(s) == 1] + [37 * 29, 100_003])
def test_threshold_bits_over_sizes(numel, dtype, place):
    scores = torch.rand(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    words = place.kernels.threshold_bits([scores.to(place.device)], [0.625], [numel])
    assert words.dtype == torch.int32 and words.shape == ((numel + 31) // 32,)
    assert torch.equal(ops.unpack_bits(words, numel).cpu(), scores.double() >= 0.625)
    assert not ops.unpack_bits(words, 32 * words.numel())[numel:].any(), "spare bits must be 0"
    assert int(place.kernels.popcount_bits(words)) == int((scores.double() >= 0.625).sum())


def test_threshold_bits_of_special_scores(dtype, place):
    inf, nan = math.inf, math.nan
    scores = torch.tensor([0.0, -0.0, nan, inf, -inf, 0.5, torch.finfo(dtype).smallest_normal], dtype=dtype)
    for threshold in (0.0, 0.5, inf, -inf, nan):
        for lowest, beyond in ((False, operator.gt), (True, operator.lt)):
            for tie_end in (0, 1, 7):
                words = place.kernels.threshold_bits([scores.to(place.device)], [threshold], [tie_end], lowest)
                expected = [
                    beyond(score, threshold) or (score == threshold and i < tie_end)
                    for i, score in enumerate(scores.tolist())
                ]
                assert ops.unpack_bits(words, 7).tolist() == expected, (threshold, lowest, tie_end)


def test_threshold_bits_round_the_threshold_to_fp32_only(dtype, place):
    """1.001 lies between 1 and the next bf16 value, 0.1 between two fp32 values: 1 is below it, 0.1 in fp32 is not."""
    scores = torch.tensor([1.0, 1.5], dtype=dtype, device=place.device)
    assert ops.unpack_bits(place.kernels.threshold_bits([scores], [1.001], [2]), 2).tolist() == [False, True]
    scores = torch.tensor([0.7], device=place.device)
    assert ops.unpack_bits(place.kernels.threshold_bits([scores], [0.7], [1]), 1).tolist() == [True]


def test_threshold_bits_of_a_list(place):
    """Words follow each other; every tensor has its own threshold and end of ties."""
    case = Case(place.device)
    scores = case.new_grads()
    thresholds = [0.5 - 0.25 * (i % 5) for i in range(len(scores))]
    for tensor, threshold in zip(scores, thresholds, strict=True):
        tensor.view(-1)[::3] = threshold  # exact in 16 bits
    tie_ends = [tensor.numel() // (i % 3 + 1) for i, tensor in enumerate(scores)]
    words = place.kernels.threshold_bits(scores, thresholds, tie_ends)
    sizes = [(tensor.numel() + 31) // 32 for tensor in scores]
    for tensor, own, threshold, tie_end in zip(scores, words.split(sizes), thresholds, tie_ends, strict=True):
        flat = tensor.view(-1).double().cpu()
        expected = (flat > threshold) | ((flat == threshold) & (torch.arange(flat.numel()) < tie_end))
        assert torch.equal(ops.unpack_bits(own, flat.numel()).cpu(), expected)
    assert case.guards.intact()


@pytest.mark.parametrize("shape", [(0,), (1,), (31, 33), (4, 0)], ids=str)
def test_packing_round_trip(shape, device):
    bits = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    words = ops.pack_bits(bits.to(device))
    flat = bits.flatten().tolist()
    expected = [sum(bit << i for i, bit in enumerate(flat[w : w + 32])) for w in range(0, len(flat), 32)]
    assert [word % 2**32 for word in words.tolist()] == expected
    assert torch.equal(ops.unpack_bits(words, bits.numel()).view(shape).cpu(), bits)
    assert (
        torch.equal(ops.pack_bits(bits.t().to(device)), ops.pack_bits(bits.t().contiguous().to(device)))
        or not shape[1:]
    )


@pytest.mark.parametrize("words, expected", [([], 0), ([0], 0), ([-1], 32), ([1, -(2**31), 7], 5)], ids=str)
def test_popcount_bits(words, expected, place):
    count = place.kernels.popcount_bits(torch.tensor(words, dtype=torch.int32, device=place.device))
    assert count.dtype == torch.int64 and count.shape == () and int(count) == expected


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("n_words", [0, 1, 31, 32, 33, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 6 * BLOCK + 5, 50_003])
def test_overlap_bits(n_words, offset, place):
    """Views between words of ones, of which none may be counted."""
    generator = torch.Generator().manual_seed(n_words)
    a, b = (torch.rand(32 * n_words, generator=generator) < p for p in (0.3, 0.6))
    ones = torch.full((offset + n_words + 9,), -1, dtype=torch.int32, device=place.device)
    views = [ones.clone()[offset : offset + n_words].copy_(ops.pack_bits(bits)) for bits in (a, b)]
    counts = place.kernels.overlap_bits(*views)
    assert counts.dtype == torch.int64 and counts.shape == (2,)
    assert counts.tolist() == [int((a & b).sum()), int((a | b).sum())]
