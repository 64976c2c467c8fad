"""`estimate_fisher`: the empirical Fisher information of every parameter, example by example (Eq. 10)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import require
from .batches import count_examples, require_batch
from .exact import Exact, Losses, gradients, square_into, sum_dtype, zeros
from .information import Fisher
from .losses import LABELS
from .restore import borrowed, random_state
from .scope import backbone, chosen, left_out, warn_of_other_ranks

RULES = ("exact", "batch", "released")


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    per_example_loss: Callable[..., Tensor],
    *,
    rule: str = "exact",
    labels: str = "true",
    train_mode: bool | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    limit: int | None = None,
    check: bool = True,
    max_grad_norm: float = 1.0,
    graph: bool = False,
    progress: bool = False,
) -> Fisher:
    """Estimate F = 1/|D| sum over examples of (d log p(y | x) / d w)**2 for every trained weight.

    Model mode, buffers, gradients and requires_grad are afterwards as they were, so is the random state of torch, numpy
    and python, whatever the loader draws from it, and nothing is set on the model's modules. Gradient checkpointing is
    left out during the pass: memory is that of a pass without it.

    Args:
        model: the pretrained model.
        batches: anything whose tensors, in mappings, lists or tuples, have the example as their first dimension.
        per_example_loss: called as ``per_example_loss(model, batch)``, or with ``labels=`` where that is not "true";
            returns [B], one loss an example, each of its own example only. It moves the batch to the device.
        rule: "exact": Eq. 10. "batch": squares of each batch's mean gradient, averaged over batches; "released": the
            same with each tensor's gradient clipped to ``max_grad_norm`` first and dropout on, as the released code.
        labels: "true" (the paper's), "sampled" from the model, or "predicted"; the loss must take ``labels=``.
        train_mode: dropout on; by default only in rule "released".
        include: names to estimate, with or without a wrapper's prefixes; by default all that require a gradient.
        exclude: names to leave out. What trains but is not estimated is in no mask: it is trained fully.
        limit: stop after this many batches.
        check: compare two examples in one batch with each alone, first; a parameter for which they differ is then
            estimated one example at a time. Whatever this says, every batch is looked at for whose rows are whose and
            for parameters used in the forward pass of an autograd function. What only the backward pass of such a
            function, or a hook, adds to the gradient of parameters is not seen without the check, and left out.
        graph: capture the pass in a CUDA graph, rule "exact": for batches of one shape and a loss function that never
            waits for the device. Batches of another shape run as usual, and so does a model whose graph does not prove
            whose rows are whose, such as one that selects rows by index: that is looked at in every batch.
        progress: show a bar (needs tqdm).

    Returns:
        `Fisher`: sums in float32 (float64 for float64 weights) by the bare model's names, and how many terms they have.
        Where torch.distributed runs several ranks, it is of this rank's batches.

    Raises:
        ValueError: losses that are not [B], not finite, without a gradient, or depend on other examples; no batch; a
            name in ``include`` that the model does not have, that is frozen, or that no loss depends on; BatchNorm in
            training mode; single examples in place of batches; sharded, placeholder or meta parameters; complex ones.
        RuntimeError: a backward pass inside the model or the loss adds to parameters' gradients, as reentrant
            checkpoints other than torch's do; or saved-tensor hooks are active that cannot be left out, as any around
            the whole call are, ``torch.autograd.graph.save_on_cpu()`` among them.
    """
    require("rule", rule, rule in RULES, f"one of {RULES}")
    require("labels", labels, labels in LABELS, f"one of {LABELS}")
    require("limit", limit, limit is None or limit > 0, "a positive number of batches or None")
    train_mode = rule == "released" if train_mode is None else train_mode
    params = chosen(model, include, exclude)
    if train_mode:
        _refuse_batch_norm(model)
    warn_of_other_ranks()
    with random_state(), borrowed(model, train_mode):
        iterator = iter(batches)  # a loader that shuffles draws here already
        first = next(iterator, None)
        require("batches", [], first is not None, "at least one batch")
        require_batch(first, batches)
        stream = itertools.islice(itertools.chain([first], iterator), limit)
        if progress:
            from tqdm import tqdm

            stream = tqdm(stream, desc="Fisher information", unit="batch")
        losses = Losses(model, per_example_loss, labels)
        if rule == "exact":
            count_examples(first)  # refused here, before the model fails on it
            sums, count, notes = Exact(params, losses, graph).run(first, stream, check)
        else:
            clip = max_grad_norm if rule == "released" else None
            sums, count, notes = _square_batches(params, losses, stream, clip)
    losses.require_finite()
    unused = [name for name in params if notes[name] == "no gradient"] if include is not None else []
    require("include", unused, not unused, "names of parameters that the losses depend on")
    scope = dict(backbone=backbone(model, params), left_out=left_out(model, params))
    return Fisher(sums, count, rule=rule, notes=notes, **scope)


def _square_batches(params: dict[str, nn.Parameter], losses: Losses, stream: Iterable[Any], clip: float | None):
    """Sum over batches of the squared gradient of the batch's mean loss."""
    sums = zeros(params)
    used: set[str] = set()
    count = 0
    for batch in stream:
        loss = losses.counted(batch).mean()
        grads = gradients(loss, list(params.values()))
        used.update(name for name, grad in zip(params, grads, strict=True) if grad is not None)
        if clip is not None:  # a tensor at a time, as the released code
            norms = [None if g is None else torch.linalg.vector_norm(g, dtype=sum_dtype(g)) for g in grads]
            grads = [
                None if g is None else g * (clip / (norm + 1e-6)).clamp(max=1.0).to(g.dtype)
                for g, norm in zip(grads, norms, strict=True)
            ]
        square_into(list(sums.values()), grads, 1.0)
        count += 1
    return sums, count, {n: "squared batch gradient" if n in used else "no gradient" for n in params}


def _refuse_batch_norm(model: nn.Module) -> None:
    found = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    require("train_mode", True, not found, f"False for a model with batch norm, which mixes examples: {found[:3]}")
