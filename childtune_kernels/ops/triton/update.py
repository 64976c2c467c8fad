"""The AdamW updates in Triton: a small launch derives every parameter's scalars, a second updates all weights.

Source: Algorithm 1 and Eq. 1-4 of Xu et al. 2021; order of operations: `reference`.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from ..update import DECAY_OUTSIDE, Update
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


def _rule(update: Update) -> int:
    """Return what the kernel does with gradients, by what the update's lists hold."""
    if update.mask_words:
        return (_CHILD_DECAY_ALL if update.hyper.numpy()[:, DECAY_OUTSIDE].any() else _CHILD).value
    if update.indices:
        return (_COMPACT_BERNOULLI if update.draws else _COMPACT).value
    return (_BERNOULLI if update.draws else _PLAIN).value


def adamw_(update: Update) -> None:
    """Launch `reference.adamw_`: upload one table, derive the scalars, update in one launch a combination of dtypes."""
    n = len(update)
    if not n:
        return
    device, rule = update.device, _rule(update)
    block, part, scalar_part, num_warps = _sizes(rule, bool(update.companions or update.rounding_keys))
    compact = bool(update.indices)
    sparse = compact and update.exp_avgs.sizes.sum() <= _SPARSE_CHILD * update.params.sizes.sum()

    beside = [c.dtype if c.numel() else None for c in update.companions] or [None] * n
    kinds = zip(update.params.dtypes, update.exp_avgs.dtypes, beside, strict=True)
    plan = layout(device, block, update.exp_avgs.numels, tuple(kinds))
    none = np.zeros(n, np.int64)
    children = update.mask_words.addresses if update.mask_words else none
    if compact:
        children = update.indices.addresses | (update.grads.sizes != update.params.sizes) * GRAD_PACKED.value
    lists = (
        update.params,
        update.grads,
        update.exp_avgs,
        update.exp_avg_sqs,
        update.companions,
        update.steps,
        update.lrs,
    )
    fields = [values.addresses if values else none for values in lists]
    fields += [keys.array if keys else none for keys in (update.mask_keys, update.rounding_keys)]
    fields += [children, plan.numels]
    host = np.concatenate((fields, update.hyper.numpy().view(np.int64).T))
    if plan.order is not None:
        host = host[:, plan.order]
    grad_scale, found_inf, grad_norm = update.scaling
    with on_device(device):
        table = upload(host, device)
        scalars = torch.empty(n * SCALARS.value, dtype=torch.int32, device=device)
        begin_kernel[(triton.cdiv(n, 128),)](
            table, scalars, n, grad_scale, found_inf, grad_norm, HAS_LRS=bool(update.lrs), BLOCK=128, **OPTIONS
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
                STOCHASTIC=bool(update.rounding_keys) and beside is None and param_dtype != torch.float32,
                PARAM_DTYPE=TRITON_DTYPES[param_dtype],
                STATE_DTYPE=TRITON_DTYPES[state_dtype],
                BLOCK=block,
                PART=part,
                SCALAR_PART=part if INTERPRET else scalar_part,  # interpreting costs 15 ms a piece
                num_warps=_OTHER_WARPS if compact and not (sparse and param_dtype == torch.float32) else num_warps,
                **OPTIONS,
            )
