"""The AdamW updates in Triton: a small launch derives every parameter's scalars, a second updates all weights.

Source: Algorithm 1 and Eq. 1-4 of Xu et al. 2021; order of operations: `reference`.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from ..reference import HYPER_COLUMNS
from ..tensors import IntList, TensorList
from .adamw import CHILD, COMPANION, EXP_AVG, EXP_AVG_SQ, GRAD, KEY, NUMEL, PARAM, ROUNDING_KEY, SCALARS, begin_kernel
from .blocks import GRAD_PACKED, compact_block, dense_block, masked_block
from .launch import INTERPRET, OPTIONS, TRITON_DTYPES, is_aligned, layout, locate, on_device, upload
from .rounding import COMPENSATION, MASTER, NO_COMPANION

# What a launch does with its gradients: one kernel, since these differ in a few lines of it.
_PLAIN, _BERNOULLI, _CHILD, _CHILD_DECAY_ALL, _COMPACT, _COMPACT_BERNOULLI = map(tl.constexpr, range(6))


@triton.jit
def _update_block(
    addresses,
    keys,
    child,
    row,
    start,
    numel,
    RULE: tl.constexpr,
    COMPANION: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    MASKED: tl.constexpr = RULE == _CHILD or RULE == _CHILD_DECAY_ALL
    COMPACT: tl.constexpr = RULE == _COMPACT or RULE == _COMPACT_BERNOULLI
    BERNOULLI: tl.constexpr = RULE == _BERNOULLI or RULE == _COMPACT_BERNOULLI
    whole = True
    if MASKED or COMPACT:
        whole = child == 0  # no words or indices: a tensor that the mask does not name
    if whole:
        dense_block(
            addresses, keys, row, start, numel, BERNOULLI, COMPANION, STOCHASTIC,
            PARAM_DTYPE, STATE_DTYPE, ALIGNED, GRAD_ALIGNED, FULL, BLOCK,
        )  # fmt: skip
    elif MASKED:
        masked_block(
            addresses, child, row, start, numel, RULE == _CHILD_DECAY_ALL,
            PARAM_DTYPE, STATE_DTYPE, ALIGNED, GRAD_ALIGNED, FULL, BLOCK,
        )  # fmt: skip
    elif COMPACT:
        compact_block(
            addresses, keys, child, row, start, numel, BERNOULLI, COMPANION, STOCHASTIC,
            PARAM_DTYPE, STATE_DTYPE, ALIGNED, GRAD_ALIGNED, FULL, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["coarse_shift", "first_row", "n"])
def _update_kernel(
    table,
    scalars,
    first_block,
    coarse,
    coarse_shift,
    first_row,
    n,
    RULE: tl.constexpr,
    BESIDE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    SCALAR_PART: tl.constexpr,
):
    """Update all tensors of one combination of dtypes, a block a program.

    grid: (total blocks,)
    """
    tensor, block = locate(first_block, coarse, coarse_shift)
    row = scalars + (first_row + tensor) * SCALARS
    field = table + first_row + tensor
    start = block * BLOCK
    # all loads that decide what follows stand together: each level of dependence costs a block's lifetime dear
    addresses = (
        tl.load(field + PARAM * n),
        tl.load(field + GRAD * n),
        tl.load(field + EXP_AVG * n),
        tl.load(field + EXP_AVG_SQ * n),
        tl.load(field + COMPANION * n),
    )
    keys = (tl.load(field + KEY * n), tl.load(field + ROUNDING_KEY * n))
    child = tl.load(field + CHILD * n)
    numel = tl.load(field + NUMEL * n)
    apply = tl.load(row + 13)  # 0 where the gradients overflowed: nothing is written
    aligned = (
        is_aligned(addresses[0], PARAM_DTYPE)
        & is_aligned(addresses[2], STATE_DTYPE)
        & is_aligned(addresses[3], STATE_DTYPE)
        & is_aligned(addresses[4], tl.float32 if BESIDE == MASTER else PARAM_DTYPE)
    )
    if RULE == _COMPACT or RULE == _COMPACT_BERNOULLI:
        aligned = aligned & is_aligned(child & ~GRAD_PACKED, tl.int32)
    if apply != 0:
        # several parts a program: the loads above are waited for once. Each derives 16-bit weights' addresses itself:
        # where LLVM kept them through all parts, Triton 3.8 (sm_90) and 3.9 (sm_80) ran out of registers
        for part in tl.range(0, BLOCK, PART, disable_licm=PARAM_DTYPE != tl.float32):
            first = start + part
            if aligned & (first + PART <= numel):
                # gradients that are views of a bucket may lie anywhere, and must not make the rest scalar
                if is_aligned(addresses[1], PARAM_DTYPE):
                    _update_block(
                        addresses, keys, child, row, first, numel, RULE, BESIDE, STOCHASTIC,
                        PARAM_DTYPE, STATE_DTYPE, True, True, True, PART,
                    )  # fmt: skip
                else:
                    _update_block(
                        addresses, keys, child, row, first, numel, RULE, BESIDE, STOCHASTIC,
                        PARAM_DTYPE, STATE_DTYPE, True, False, True, PART,
                    )  # fmt: skip
            else:  # one element a thread at a time: scalar accesses to a whole part would double the registers
                for element in range(0, PART, SCALAR_PART):
                    if first + element < numel:
                        _update_block(
                            addresses, keys, child, row, first + element, numel, RULE, BESIDE, STOCHASTIC,
                            PARAM_DTYPE, STATE_DTYPE, False, False, False, SCALAR_PART,
                        )  # fmt: skip


# Elements of a program, at a time, at a time where accesses are scalar, and warps, by rule. H200, BERT-large, fp32:
# F takes 2.227 ms so, 2.253 with 512 elements a program, 2.267 with 1024 at a time and 4 warps; a random D of p = 0.1
# takes 1.99 ms so (40 registers), 2.07 with 64 scalar accesses at a time (43), 2.09 with 1024 elements a program (64)
# and 2.05 if capped at 36 registers, which spills.
_SIZES = {
    _PLAIN.value: (1024, 512, 64, 2),
    _BERNOULLI.value: (1024, 512, 64, 2),
    _CHILD.value: (256, 256, 32, 2),
    _CHILD_DECAY_ALL.value: (256, 256, 32, 2),
    _COMPACT.value: (512, 512, 64, 8),
    _COMPACT_BERNOULLI.value: (512, 512, 64, 8),
}
# Beside companions or random words of 16-bit weights, 16 elements a thread would take 78 registers and more. bf16 F
# with stochastic rounding takes 1.79 ms so and 1.85 with 512 elements and 2 warps, with compensations 2.09 and 2.13.
_LOW_PRECISION_SIZES = (256, 256, 32, 1)
# A sparse child of fp32 weights waits for its gathers, and wants many threads with few of them each; otherwise 4 warps:
# fp32 p = 0.1 takes 0.96 ms with 8 warps and 1.06 with 4, clustered p = 0.3 1.24 and 1.18, bf16 weights with masters
# and a clustered p = 0.1 0.47 and 0.42 (same H200, same model).
_SPARSE_CHILD, _OTHER_WARPS = 0.2, 4


def _sizes(rule: int, low_precision: bool) -> tuple[int, int, int, int]:
    return _LOW_PRECISION_SIZES if low_precision and rule in (_PLAIN.value, _BERNOULLI.value) else _SIZES[rule]


def _run(rule, lists, keys, children, companions, rounding_keys, lrs, grad_scale, found_inf, grad_norm) -> None:
    """Upload one table, derive the scalars in one launch, update in one launch a combination of dtypes."""
    if not lists[0]:
        return
    hyper = lists[-1]
    params, grads, exp_avgs, exp_avg_sqs, steps = tensors = [TensorList.of(values) for values in lists[:-1]]
    companions = TensorList.of(companions)
    device, n = params[0].device, len(params)
    block, part, scalar_part, num_warps = _sizes(rule, bool(companions) or bool(rounding_keys))
    compact = rule in (_COMPACT.value, _COMPACT_BERNOULLI.value)
    sparse = compact and exp_avgs.sizes.sum() <= _SPARSE_CHILD * params.sizes.sum()

    def lay_out():
        beside = [c.dtype if c.numel() else None for c in companions] or [None] * n
        kinds = zip(params.dtypes, exp_avgs.dtypes, beside, strict=True)
        return layout(device, block, exp_avgs.numels, tuple(kinds))

    plan = lay_out()
    none = np.zeros(n, np.int64)
    fields = [values.addresses for values in tensors[:-1]] + [companions.addresses if companions else none]
    fields += [steps.addresses, TensorList.of(lrs).addresses if lrs else none]
    fields += [IntList.of(k).array if k else none for k in (keys, rounding_keys)]
    fields += [none if children is None else children, plan.numels]
    host = np.concatenate((fields, hyper.numpy().view(np.int64).T))
    if plan.order is not None:
        host = host[:, plan.order]
    with on_device(device):
        table = upload(host, device)
        scalars = torch.empty(n * SCALARS.value, dtype=torch.int32, device=device)
        begin_kernel[(triton.cdiv(n, 128),)](
            table, scalars, n, grad_scale, found_inf, grad_norm, HAS_LRS=bool(lrs), BLOCK=128, **OPTIONS
        )
        for launch in plan.launches:
            param_dtype, state_dtype, beside = launch.dtypes
            _update_kernel[(launch.n_blocks,)](
                table,
                scalars,
                launch.first_block,
                launch.coarse,
                launch.coarse_shift,
                launch.first_row,
                n,
                RULE=rule,
                BESIDE={None: NO_COMPANION, torch.float32: MASTER}.get(beside, COMPENSATION).value,
                STOCHASTIC=bool(rounding_keys) and beside is None and param_dtype != torch.float32,
                PARAM_DTYPE=TRITON_DTYPES[param_dtype],
                STATE_DTYPE=TRITON_DTYPES[state_dtype],
                BLOCK=block,
                PART=part,
                SCALAR_PART=part if INTERPRET else scalar_part,  # interpreting costs 15 ms a piece
                num_warps=_OTHER_WARPS if compact and not (sparse and param_dtype == torch.float32) else num_warps,
                **OPTIONS,
            )


def adamw_(
    params, grads, exp_avgs, exp_avg_sqs, steps, hyper, companions, rounding_keys,
    lrs=(), grad_scale=None, found_inf=None, grad_norm=None,
) -> None:  # fmt: skip
    """Launch `reference.adamw_`."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps, hyper)
    _run(_PLAIN.value, lists, None, None, companions, rounding_keys, lrs, grad_scale, found_inf, grad_norm)


def adamw_bernoulli_(
    params, grads, exp_avgs, exp_avg_sqs, steps, hyper, keys, companions, rounding_keys,
    lrs=(), grad_scale=None, found_inf=None, grad_norm=None,
) -> None:  # fmt: skip
    """Launch `reference.adamw_bernoulli_`."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps, hyper)
    _run(_BERNOULLI.value, lists, keys, None, companions, rounding_keys, lrs, grad_scale, found_inf, grad_norm)


def adamw_masked_(
    params, grads, exp_avgs, exp_avg_sqs, steps, hyper, mask_words, decay_all,
    lrs=(), grad_scale=None, found_inf=None, grad_norm=None,
) -> None:  # fmt: skip
    """Launch `reference.adamw_masked_`."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps, hyper)
    rule = (_CHILD_DECAY_ALL if decay_all else _CHILD).value
    _run(rule, lists, None, TensorList.of(mask_words).addresses, (), (), lrs, grad_scale, found_inf, grad_norm)


def adamw_compact_(
    params, grads, exp_avgs, exp_avg_sqs, steps, hyper, indices, keys, companions, rounding_keys,
    lrs=(), grad_scale=None, found_inf=None, grad_norm=None,
) -> None:  # fmt: skip
    """Launch `reference.adamw_compact_`."""
    lists = (TensorList.of(params), TensorList.of(grads), TensorList.of(exp_avgs), exp_avg_sqs, steps, hyper)
    p = hyper.numpy()[:, HYPER_COLUMNS.index("reserve_p")]
    rule = (_COMPACT_BERNOULLI if (p < 1).any() else _COMPACT).value
    packed = lists[1].sizes != lists[0].sizes
    children = TensorList.of(indices).addresses | packed * GRAD_PACKED.value
    _run(rule, lists, keys, children, companions, rounding_keys, lrs, grad_scale, found_inf, grad_norm)
