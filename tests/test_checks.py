"""What the ops refuse and accept, on both sides of every boundary, with nothing behind that would refuse it too."""

from __future__ import annotations

import re

import pytest
import torch

from childtune_kernels.errors import require
from childtune_kernels.ops import checks

CPU, META = torch.device("cpu"), torch.device("meta")
INF = float("inf")


def zeros(*shape, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def words(n: int, **kwargs) -> torch.Tensor:
    return zeros(n, **{"dtype": torch.int32, **kwargs})


def moments(exp_avg, exp_avg_sq):
    return {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


class DTensor(torch.Tensor):
    """Called like torch's sharded tensors."""


SHARD = zeros(2)
SHARD._fsdp_flattened = True
FLAT = zeros(2)
FLAT._is_flat_param = True
STEP = zeros(dtype=torch.float64)
FOLDED = zeros(4, 6).t()  # not contiguous
SPARSE = zeros(2, 2).to_sparse()
BIG = torch.empty(2**31, dtype=torch.float32, device="meta")
HALF, BF16, F64 = torch.float16, torch.bfloat16, torch.float64
D3, F3 = zeros(2, 3, 4), zeros(2, 3, 5)

# The check, its arguments, and what the error says, or None where they are accepted.
CASES = [
    ("check_words", ("m", words(0), zeros(33)), None),
    ("check_words", ("m", words(1), zeros(32)), None),
    ("check_words", ("m", words(2), zeros(33)), None),
    ("check_words", ("m", words(1), zeros(33)), "m must hold 2 contiguous words, got 1"),
    ("check_words", ("m", words(3), zeros(33)), "m must hold 2 contiguous words, got 3"),
    ("check_words", ("m", words(4)[::2], zeros(33)), "m must hold 2 contiguous words, got 2"),
    ("check_words", ("m", words(2, device="meta"), zeros(33)),
     "m must be 1-D int32 on cpu, got 1-D torch.int32 on meta"),
    ("check_words", ("m", words(2)[None], zeros(33)), "m must be 1-D int32 on cpu, got 2-D"),
    ("check_words", ("m", words(2).long(), zeros(33)), "m must be 1-D int32 on cpu, got 1-D torch.int64"),
    ("check_parameter", ("p", zeros(2, dtype=F64)),
     "p must have dtype float32, bfloat16 or float16, got torch.float64"),
    ("check_parameter", ("p", zeros(2).as_subclass(DTensor)), "p must be an ordinary tensor, got a DTensor"),
    ("check_parameter", ("p", SHARD), "p must be an ordinary tensor, got a shard of FullyShardedDataParallel"),
    ("check_parameter", ("p", FLAT), "p must be an ordinary tensor, got a shard of FullyShardedDataParallel"),
    ("check_parameter", ("p", zeros(2, dtype=HALF)), None),
    ("check_gradient", ("g", SPARSE, zeros(2, 2)), "gradient of g must be dense, got layout torch.sparse_coo"),
    ("check_gradient", ("g", zeros(2), zeros(3)), "gradient of g must have shape (3,), got (2,)"),
    ("check_gradient", ("g", zeros(2, dtype=HALF), zeros(2)), "must have dtype torch.float32, got torch.float16"),
    ("check_gradient", ("g", zeros(2, device="meta"), zeros(2)), "gradient of g must have device cpu, got meta"),
    ("check_state", ("s", zeros(2), STEP, moments(zeros(2), zeros(2))), None),
    ("check_state", ("s", zeros(2), STEP, moments(zeros(1), zeros(1)), (1,)), None),
    ("check_state", ("s", zeros(2), STEP.expand(2), moments(zeros(2), zeros(2))),
     "s: step must be one float64 on cpu, got 2 x"),
    ("check_state", ("s", zeros(2), STEP.to("meta"), moments(zeros(2), zeros(2))),
     "s: step must be one float64 on cpu"),
    ("check_state", ("s", zeros(2), STEP.float(), moments(zeros(2), zeros(2))), "got 1 x torch.float32 on cpu"),
    ("check_state", ("s", zeros(2), STEP, moments(zeros(1), zeros(2))),
     "s: exp_avg must have shape (2,), device cpu and dtype"),
    ("check_state", ("s", zeros(2), STEP, moments(zeros(2), zeros(1))), "s: exp_avg_sq must have shape (2,)"),
    ("check_state", ("s", zeros(2), STEP, moments(zeros(2), zeros(2)), (1,)), "s: exp_avg must have shape (1,)"),
    ("check_state", ("s", zeros(2), STEP, moments(zeros(2, dtype=HALF), zeros(2, dtype=BF16))),
     "in ['torch.float16'], got"),
    ("check_state", ("s", zeros(6, 4), STEP, moments(FOLDED, zeros(6, 4))),
     "s: exp_avg must be contiguous, got strides (1, 6)"),
    ("check_state", ("s", zeros(2), STEP, moments(zeros(2, device="meta"), zeros(2))), "got (2,), meta, torch.float32"),
    ("check_indices", ("i", words(2), zeros(2), zeros(2)), None),
    ("check_indices", ("i", words(0), zeros(2), zeros(2)), None),
    ("check_indices", ("i", words(3), zeros(2), zeros(3)), "i must index at most 2 elements, got 3"),
    ("check_indices", ("i", words(2, device="meta"), BIG, zeros(2)), "index at most 2147483647 elements, got 2"),
    ("check_indices", ("i", words(2, device="meta"), BIG[1:], zeros(2)), None),
    ("check_indices", ("i", words(2).long(), zeros(2), zeros(2)),
     "i must be contiguous 1-D int32 on cpu, got 1-D torch.int64"),
    ("check_indices", ("i", words(2)[None], zeros(2), zeros(2)), "on cpu, got 2-D torch.int32"),
    ("check_indices", ("i", words(2, device="meta"), zeros(2), zeros(2)), "got 1-D torch.int32 on meta"),
    ("check_indices", ("i", words(4)[::2], zeros(2), zeros(2)), "got 1-D torch.int32 on cpu, strides (2,)"),
    ("check_companion", ("c", zeros(0), zeros(2), (2,)), None),
    ("check_companion", ("c", zeros(1), zeros(2, dtype=HALF), (1,)), None),
    ("check_companion", ("c", zeros(1, dtype=HALF), zeros(2, dtype=HALF), (1,)), None),
    ("check_companion", ("c", zeros(1, dtype=BF16), zeros(2, dtype=HALF), (1,)), "c must have shape (1,), device cpu"),
    ("check_companion", ("c", zeros(2), zeros(2), (2,)), "dtype in [], got (2,), cpu, torch.float32"),
    ("check_packed_gradient", ("p", zeros(1), zeros(2), (1,)), None),
    ("check_packed_gradient", ("p", zeros(2), zeros(2), (1,)), None),
    ("check_packed_gradient", ("p", zeros(3), zeros(2), (1,)), "gradient of p must have shape (1,), device cpu"),
    ("check_packed_gradient", ("p", zeros(3), zeros(2), (2,)), "gradient of p must have shape (2,), got (3,)"),
    ("check_packed_gradient", ("p", zeros(1, dtype=HALF), zeros(2), (1,)), "dtype in ['torch.float32'], got (1,)"),
    ("check_accumulate", ([zeros(2)], [zeros(2, dtype=HALF)]), None),
    ("check_accumulate", ([zeros(2)], []), "grads must have 1 entries, got 0"),
    ("check_accumulate", ([zeros(2)], [zeros(2, dtype=F64)]), "grads[0] must be a contiguous float32"),
    ("check_accumulate", ([zeros(2, 2)], [SPARSE]), "got torch.float32, torch.sparse_coo"),
    ("check_accumulate", ([zeros(6, 4)], [FOLDED]), "grads[0] must be a contiguous float32"),
    ("check_accumulate", ([zeros(2, dtype=HALF)], [zeros(2, dtype=HALF)]), "accumulators[0] must have shape (2,)"),
    ("check_accumulate", ([zeros(2), zeros(2, device="meta")], [zeros(2), zeros(2, device="meta")]),
     "grads[1] must have the list's device cpu, got meta"),
    ("check_gather", ([zeros(2)], [zeros(3, 4)], [words(2)]), None),
    ("check_gather", ([zeros(2)], [], [words(2)]), "grads must have 1 entries, got 0"),
    ("check_gather", ([zeros(2)], [zeros(3)], []), "indices must have 1 entries, got 0"),
    ("check_gather", ([zeros(2)], [zeros(3)], [words(2).long()]), "indices[0] must be contiguous 1-D int32"),
    ("check_gather", ([zeros(4)], [zeros(3)], [words(4)]), "indices[0] must index at most 3 elements, got 4"),
    ("check_gather", ([zeros(1)], [zeros(3)], [words(2)]), "packed[0] must have shape (2,)"),
    ("check_gather", ([zeros(2, dtype=HALF)], [zeros(3)], [words(2)]),
     "packed[0] must have shape (2,), device cpu and dtype"),
    ("check_gather", ([zeros(2, dtype=F64)], [zeros(3, dtype=F64)], [words(2)]), "grads[0] must have shape (3,)"),
    ("check_gather", ([zeros(2)], [FOLDED], [words(2)]), "grads[0] must be contiguous, got strides (1, 6)"),
    ("check_gather", ([zeros(2), zeros(2, device="meta")], [zeros(3), zeros(3, device="meta")],
                      [words(2), words(2, device="meta")]), "grads[1] must have the list's device cpu, got meta"),
    ("check_fisher", (zeros(4, 5), D3, F3, None, (4, 5)), None),
    ("check_fisher", (zeros(4), D3, D3, zeros(4), (4,)), None),
    ("check_fisher", (zeros(4), D3, D3.half(), None, (4,)), None),  # a factor may have another dtype
    ("check_fisher", (zeros(4, dtype=F64), D3.double(), None, None, (4,)), None),
    ("check_fisher", (zeros(4, 5), D3, zeros(2, 3, 5).half(), None, (4, 5)),
     "x must have d's dtype torch.float32, got torch.float16"),
    ("check_fisher", (zeros(4), D3[0], None, None, (4,)),
     "must have shapes [B, T, O] and [B, T, ...], got (3, 4) and None"),
    ("check_fisher", (zeros(4, 5), D3, F3[0], None, (4, 5)), "[B, T, ...], got (2, 3, 4) and (3, 5)"),
    ("check_fisher", (zeros(4, 5), D3, zeros(2, 2, 5), None, (4, 5)), "got (2, 3, 4) and (2, 2, 5)"),
    ("check_fisher", (zeros(4), D3.int(), None, None, (4,)), "d must be of a floating dtype, got torch.int32"),
    ("check_fisher", (zeros(3), D3.mT, None, None, (3,)),
     "d must be contiguous in its last dimension, got strides (12, 1, 4)"),
    ("check_fisher", (zeros(4), D3, zeros(2, 4, 3).mT, None, (4,)),
     "x or factor must be contiguous in its last dimension"),
    ("check_fisher", (zeros(1), zeros(2, 3, 8)[..., ::8], None, None, (1,)), None),  # one entry has no stride
    ("check_fisher", (zeros(4, dtype=F64), D3, None, None, (4,)), "total must be a contiguous torch.float32 tensor"),
    ("check_fisher", (zeros(4), D3.double(), None, None, (4,)), "total must be a contiguous torch.float64 tensor"),
    ("check_fisher", (zeros(5), D3, None, None, (4,)), "of shape (4,) on cpu, got torch.float32 of shape (5,) on cpu"),
    ("check_fisher", (FOLDED, zeros(2, 3, 6), D3, None, (6, 4)), "total must be a contiguous torch.float32 tensor"),
    ("check_fisher", (zeros(4, device="meta"), D3, None, None, (4,)),
     "of shape (4,) on cpu, got torch.float32 of shape (4,) on meta"),
    ("check_fisher", (zeros(4, 5), D3, F3, zeros(5), (4, 5)),
     "second total must be a contiguous torch.float32 tensor of shape (4,)"),
    ("check_stream", (0, 1, 2**-32, 0, 0), None),
    ("check_stream", (0, 2**32 - 1, 1.0, 2**32 - 1, 4), None),
    ("check_stream", (-1, 1, 0.5, 0, 0), "offset a multiple of 4, got -1 and 0"),
    ("check_stream", (1, 1, 0.5, 0, -4), "offset a multiple of 4, got 1 and -4"),
    ("check_stream", (1, 1, 0.5, 0, 3), "offset a multiple of 4, got 1 and 3"),
    ("check_stream", (1, 0, 0.5, 0, 0), "step must be in [1, 2**32), got 0"),
    ("check_stream", (1, 2**32, 0.5, 0, 0), "step must be in [1, 2**32), got 4294967296"),
    ("check_stream", (1, 1, 0.5, -1, 0), "domain must be in [0, 2**32), got -1"),
    ("check_stream", (1, 1, 0.5, 2**32, 0), "domain must be in [0, 2**32), got 4294967296"),
    ("check_stream", (1, 1, 2**-33, 0, 0), "p must be in [2**-32, 1], got 1.16"),
    ("check_stream", (1, 1, 1 + 2**-52, 0, 0), "p must be in [2**-32, 1], got 1.0000000000000002"),
    ("check_histogram", ([zeros(2)], [2**32 - 2**11], 0, 11), None),
    ("check_histogram", ([zeros(2)], [0], 31, 1), None),
    ("check_histogram", ([zeros(2)], [0], 31, 0), None),
    ("check_histogram", ([zeros(2)], [0], 0, 12), "digits must be in [0, 11], shift in [0, 32)"),
    ("check_histogram", ([zeros(2)], [0], 0, -1), "sum at most 32, got -1 and 0"),
    ("check_histogram", ([zeros(2)], [0], 32, 0), "sum at most 32, got 0 and 32"),
    ("check_histogram", ([zeros(2)], [0], -1, 1), "sum at most 32, got 1 and -1"),
    ("check_histogram", ([zeros(2)], [0], 31, 2), "sum at most 32, got 2 and 31"),
    ("check_histogram", ([zeros(2)], [-1], 0, 4), "firsts[0] must be in [0, 2**32 - 2**4], got -1"),
    ("check_histogram", ([zeros(2)], [2**32 - 2**5 + 1], 1, 4), "[0, 2**32 - 2**5], got 4294967265"),
    ("check_histogram", ([zeros(2)], [0, 0], 0, 4), "firsts must have 1 entries, one a tensor, got 2"),
    ("check_thresholds", ([zeros(2)], [-INF], [0]), None),
    ("check_thresholds", ([zeros(2)], [], [0]), "thresholds must have 1 entries, one a tensor, got 0"),
    ("check_thresholds", ([zeros(2)], [0.0], []), "tie_ends must have 1 entries, one a tensor, got 0"),
    ("check_thresholds", ([zeros(2)], [0.0], [-1]), "tie_ends[0] must be at least 0, got -1"),
    ("check_thresholds", ([zeros(2, dtype=F64)], [0.0], [0]), "scores[0] must be a contiguous float32"),
    ("check_thresholds", ([SPARSE], [0.0], [0]), "got torch.float32, torch.sparse_coo"),
    ("check_thresholds", ([FOLDED], [0.0], [0]), "got torch.float32, strides (1, 6)"),
    ("check_thresholds", ([zeros(2), zeros(2, device="meta")], [0.0] * 2, [0] * 2),
     "scores[1] must have the list's device cpu"),
    ("check_packed", ("w", words(2)), None),
    ("check_packed", ("w", words(2).long()), "w must be contiguous int32, got torch.int64 of strides (1,)"),
    ("check_packed", ("w", words(4)[::2]), "w must be contiguous int32, got torch.int32 of strides (2,)"),
    ("check_overlap", (words(2), words(2)), None),
    ("check_overlap", (words(2), words(3)), "b must have a's shape (2,) and device cpu, got (3,) and cpu"),
    ("check_overlap", (words(2), words(2, device="meta")),
     "b must have a's shape (2,) and device cpu, got (2,) and meta"),
    ("check_overlap", (words(2).long(), words(2)), "a must be contiguous int32"),
    ("check_overlap", (words(2), words(2).long()), "b must be contiguous int32"),
]  # fmt: skip


@pytest.mark.parametrize("check, args, message", CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_both_sides_of_every_boundary(check, args, message):
    if message is None:
        getattr(checks, check)(*args)
        return
    with pytest.raises((RuntimeError, TypeError, ValueError), match=re.escape(message)):
        getattr(checks, check)(*args)


def test_the_shape_that_moments_must_have():
    """Indices give it; none with moments mean all of the parameter, none without moments nothing of it."""
    param = zeros(2, 3)
    assert checks.check_indices("i", words(4), param, zeros(4)) == (4,)
    assert checks.check_indices("i", words(0), param, zeros(2, 3)) == (2, 3)
    assert checks.check_indices("i", words(0), param, zeros(0)) == (0,)


def test_require_names_what_came():
    require("x", 3, True, "4")
    with pytest.raises(ValueError, match="^x must be 4, got '3'$"):
        require("x", "3", False, "4")
