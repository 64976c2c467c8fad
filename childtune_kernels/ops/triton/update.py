"""Updates in Triton: a small launch derives every parameter's scalars, a second updates all weights.

Source: Algorithm 1 and Eq. 1-4 of Xu et al. 2021; order of operations: `reference.adamw`.
"""

from __future__ import annotations

from importlib import import_module

import numpy as np
import torch
import triton
import triton.language as tl

from ..update import Update
from .adamw import (
    APPLY,
    CHILDREN,
    COMPANIONS,
    DECAY_OUTSIDE,
    EXP_AVG_SQS,
    EXP_AVGS,
    GRADS,
    MASK_KEYS,
    NUMELS,
    PARAMS,
    ROUNDING_KEYS,
    SCALARS,
    begin_kernel,
)
from .blocks import GRAD_PACKED, compact_block, dense_block, masked_block
from .launch import INTERPRET, OPTIONS, TRITON_DTYPES, BlockMap, is_aligned, locate, map_blocks, on_device, over
from .rounding import COMPENSATION, MASTER, NO_COMPANION

# What masks an update's gradients: one kernel, since these differ in a few lines of it.
_PLAIN, _BERNOULLI, _CHILD, _CHILD_DECAY, _COMPACT, _COMPACT_BERNOULLI = map(tl.constexpr, range(6))


@triton.jit
def _update_block(
    addresses,
    keys,
    child,
    row,
    start,
    numel,
    MASKING: tl.constexpr,
    COMPANION: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ADVANCE: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    MASKED: tl.constexpr = MASKING == _CHILD or MASKING == _CHILD_DECAY
    COMPACT: tl.constexpr = MASKING == _COMPACT or MASKING == _COMPACT_BERNOULLI
    BERNOULLI: tl.constexpr = MASKING == _BERNOULLI or MASKING == _COMPACT_BERNOULLI
    whole = True
    if MASKED or COMPACT:
        whole = child == 0  # no words or indices: a tensor that the mask does not name
    if whole:
        dense_block(
            addresses, keys, row, start, numel, BERNOULLI, COMPANION, STOCHASTIC, ADVANCE,
            PARAM_DTYPE, STATE_DTYPE, ALIGNED, GRAD_ALIGNED, FULL, BLOCK,
        )  # fmt: skip
    elif MASKED:
        decays = False
        if MASKING == _CHILD_DECAY:  # a branch: where one block wrote by a row's flag, it took 45 registers, not 40
            decays = tl.load(row + DECAY_OUTSIDE) != 0
        if decays:
            masked_block(
                addresses, child, row, start, numel, True, ADVANCE,
                PARAM_DTYPE, STATE_DTYPE, ALIGNED, GRAD_ALIGNED, FULL, BLOCK,
            )  # fmt: skip
        else:
            masked_block(
                addresses, child, row, start, numel, False, ADVANCE,
                PARAM_DTYPE, STATE_DTYPE, ALIGNED, GRAD_ALIGNED, FULL, BLOCK,
            )  # fmt: skip
    elif COMPACT:
        compact_block(
            addresses, keys, child, row, start, numel, BERNOULLI, COMPANION, STOCHASTIC, ADVANCE,
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
    MASKING: tl.constexpr,
    COMPANION: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ADVANCE: tl.constexpr,
    MOMENTS: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    SCALAR_PART: tl.constexpr,
):
    """Update all tensors of one combination of dtypes, a block a program.

    grid: (total blocks,)
    """
    # find the block
    tensor, block = locate(first_block, coarse, coarse_shift)
    row = scalars + (first_row + tensor) * SCALARS
    field = table + first_row + tensor
    start = block * BLOCK

    # load all that decides what follows, together: each level of dependence costs a block's lifetime dear
    param = tl.load(field + PARAMS * n)
    grad = tl.load(field + GRADS * n)
    exp_avg = tl.load(field + EXP_AVGS * n)
    exp_avg_sq = tl.load(field + EXP_AVG_SQS * n)
    companion = tl.load(field + COMPANIONS * n)
    keys = (tl.load(field + MASK_KEYS * n), tl.load(field + ROUNDING_KEYS * n))
    child = tl.load(field + CHILDREN * n)
    numel = tl.load(field + NUMELS * n)
    apply = tl.load(row + APPLY)
    moments = (exp_avg, exp_avg_sq) if MOMENTS == 2 else (exp_avg,)
    addresses = (param, grad, moments, companion)

    # update its parts
    aligned = (
        is_aligned(param, PARAM_DTYPE)
        & is_aligned(exp_avg, STATE_DTYPE)
        & is_aligned(exp_avg_sq, STATE_DTYPE)
        & is_aligned(companion, tl.float32 if COMPANION == MASTER else PARAM_DTYPE)
    )
    if MASKING == _COMPACT or MASKING == _COMPACT_BERNOULLI:
        aligned = aligned & is_aligned(child & ~GRAD_PACKED, tl.int32)
    if apply != 0:
        # several parts a program: the loads above are waited for once. Each derives 16-bit weights' addresses itself:
        # where LLVM kept them through all parts, Triton 3.8 (sm_90) and 3.9 (sm_80) ran out of registers
        for part in tl.range(0, BLOCK, PART, disable_licm=PARAM_DTYPE != tl.float32):
            first = start + part
            if aligned & (first + PART <= numel):
                # gradients that are views of a bucket may lie anywhere, and must not make the rest scalar
                if is_aligned(grad, PARAM_DTYPE):
                    _update_block(
                        addresses, keys, child, row, first, numel, MASKING, COMPANION, STOCHASTIC, ADVANCE,
                        PARAM_DTYPE, STATE_DTYPE, True, True, True, PART,
                    )  # fmt: skip
                else:
                    _update_block(
                        addresses, keys, child, row, first, numel, MASKING, COMPANION, STOCHASTIC, ADVANCE,
                        PARAM_DTYPE, STATE_DTYPE, True, False, True, PART,
                    )  # fmt: skip
            else:  # one element a thread at a time: scalar accesses to a whole part would double the registers
                for element in range(0, PART, SCALAR_PART):
                    if first + element < numel:
                        _update_block(
                            addresses, keys, child, row, first + element, numel, MASKING, COMPANION, STOCHASTIC,
                            ADVANCE, PARAM_DTYPE, STATE_DTYPE, False, False, False, SCALAR_PART,
                        )  # fmt: skip


_BEGIN_BLOCK = 128  # parameters a program of begin_kernel

# Elements of a program, at a time, at a time where accesses are scalar, and warps, by masking. H200, BERT-large, fp32:
# F takes 2.227 ms so, 2.253 with 512 elements a program, 2.267 with 1024 at a time and 4 warps; a random D of p = 0.1
# takes 1.99 ms so (40 registers), 2.07 with 64 scalar accesses at a time (43), 2.09 with 1024 elements a program (64)
# and 2.05 if capped at 36 registers, which spills.
_SIZES = {
    _PLAIN.value: (1024, 512, 64, 2),
    _BERNOULLI.value: (1024, 512, 64, 2),
    _CHILD.value: (256, 256, 32, 2),
    _CHILD_DECAY.value: (256, 256, 32, 2),
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


def _sizes(masking: int, low_precision: bool) -> tuple[int, int, int, int]:
    return _LOW_PRECISION_SIZES if low_precision and masking in (_PLAIN.value, _BERNOULLI.value) else _SIZES[masking]


def _masking(update: Update) -> int:
    """Return what masks the gradients, by what the update's lists and columns hold."""
    if update.mask_words:
        return (_CHILD_DECAY if update.decays_outside else _CHILD).value
    if update.indices:
        return (_COMPACT_BERNOULLI if update.draws else _COMPACT).value
    return (_BERNOULLI if update.draws else _PLAIN).value


def _map(update: Update, block: int) -> BlockMap:
    """Return the map of an update's blocks, made once: one launch a dtype of weights, of moments and of companions."""
    if block not in update.maps:
        companions = [c.dtype if c.numel() else None for c in update.companions] or [None] * len(update)
        dtypes = tuple(zip(update.params.dtypes, update.exp_avgs.dtypes, companions, strict=True))
        update.maps[block] = map_blocks(update.device, block, update.exp_avgs.numels, dtypes)
    return update.maps[block]


def _fields(update: Update) -> list[np.ndarray]:
    """Return the rows of the table that kernels read, in the order of `adamw`'s fields."""
    none = np.zeros(len(update), np.int64)
    children = update.mask_words.addresses if update.mask_words else none
    if update.indices:
        packed = update.grads.sizes != update.params.sizes
        children = update.indices.addresses | packed * GRAD_PACKED.value
    return [
        update.params.addresses,
        update.grads.addresses,
        update.exp_avgs.addresses,
        update.exp_avg_sqs.addresses if update.exp_avg_sqs else none,
        update.companions.addresses if update.companions else none,
        update.steps.addresses,
        update.lrs.addresses if update.lrs else none,
        update.mask_keys.array if update.mask_keys else none,
        update.rounding_keys.array if update.rounding_keys else none,
        children,
        update.exp_avgs.sizes,
        *update.hyper.numpy().view(np.int64).T,
    ]


def update_(update: Update) -> None:
    """Launch `reference.update_`: upload one table, derive the scalars, update, one launch a combination of dtypes."""
    if not len(update):
        return
    device, n, masking = update.device, len(update), _masking(update)
    block, part, scalar_part, num_warps = _sizes(masking, bool(update.companions or update.rounding_keys))
    compact = bool(update.indices)
    sparse = compact and update.exp_avgs.sizes.sum() <= _SPARSE_CHILD * update.params.sizes.sum()
    grad_scale, found_inf, grad_norm = update.scaling
    formula = import_module(f".{update.rule.file}", __package__)
    with on_device(device):
        table, launches = over(device, _map(update, block), _fields(update))
        scalars = torch.empty(n * SCALARS.value, dtype=torch.int32, device=device)
        begin_kernel[(triton.cdiv(n, _BEGIN_BLOCK),)](
            table, scalars, n, grad_scale, found_inf, grad_norm,
            STEP_SIZE_OF=formula.step_size, HAS_LRS=bool(update.lrs), BLOCK=_BEGIN_BLOCK, **OPTIONS,
        )  # fmt: skip
        for (param_dtype, state_dtype, companion_dtype), n_blocks, tables in launches:
            _update_kernel[(n_blocks,)](
                **tables,
                scalars=scalars,
                MASKING=masking,
                COMPANION={None: NO_COMPANION, torch.float32: MASTER}.get(companion_dtype, COMPENSATION).value,
                STOCHASTIC=bool(update.rounding_keys) and companion_dtype is None and param_dtype != torch.float32,
                ADVANCE=formula.advance,
                MOMENTS=len(update.rule.moments),
                PARAM_DTYPE=TRITON_DTYPES[param_dtype],
                STATE_DTYPE=TRITON_DTYPES[state_dtype],
                BLOCK=block,
                PART=part,
                SCALAR_PART=part if INTERPRET else scalar_part,  # interpreting costs 15 ms a piece
                num_warps=_OTHER_WARPS if compact and not (sparse and param_dtype == torch.float32) else num_warps,
                **OPTIONS,
            )
