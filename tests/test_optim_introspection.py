"""What can be asked of an optimizer: texts to the letter, masks from their specification, what has thawed by name."""

from __future__ import annotations

import pytest
import torch
from cases import MODEL, child_mask, model, optimizer

from childtune_kernels import ChildAdamW, ChildMask, philox
from childtune_kernels.optim.introspection import changed_outside_child


def test_a_description_to_the_letter():
    mask = ChildMask.from_dense({"a": torch.arange(2000) % 4 == 0, "c": torch.ones(10, dtype=torch.bool)})
    params = {name: torch.nn.Parameter(torch.zeros(n)) for name, n in (("a", 2000), ("b", 48), ("c", 10))}
    groups = [dict(params=[("a", params["a"]), ("b", params["b"])], reserve_p=0.25, seed=7)]
    opt = ChildAdamW([*groups, dict(params=[("c", params["c"])])], mask=mask, impl="reference")
    assert opt.describe().split("\n") == [
        "group  tensors        weights       in child   share  rule",
        "    0        2          2,048            548  26.76%  D: 1 tensors masked, decay='child'; "
        "F: a fresh 0.25 of the gradient each step, seed 7",
        "    1        1             10             10 100.00%  D: 1 tensors masked, decay='child'",
        "torch dialect, state packed, moments torch.float32, 16-bit weights: master, implementation: reference",
    ]


def test_a_description_without_a_mask():
    opt = ChildAdamW([torch.nn.Parameter(torch.zeros(0))], dialect="hf", state_dtype=torch.float16, impl="reference")
    assert opt.describe().split("\n")[1:] == [
        "    0        1              0              0   0.00%  every weight",
        "hf dialect, state dense, moments torch.float16, 16-bit weights: nearest, implementation: reference",
    ]


@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize("kind", ["plain", "F", "D", "F in D"])
def test_masks_follow_from_the_specification(kind, step):
    opt = optimizer(model(), kind)
    before = {name: opt.mask.words(name).clone() for name in opt.mask or ()}
    for name, shape in MODEL.items():
        expected = torch.ones(shape, dtype=torch.bool)
        if "F" in kind:
            expected &= philox.mask_at(name, shape, seed=5, step=step, p=0.3)
        if "D" in kind and name in child_mask():
            expected &= child_mask().to_dense(name)
        assert torch.equal(opt.mask_at(step, name), expected), name
    assert all(torch.equal(opt.mask.words(name), words) for name, words in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_has_thawed_is_counted_by_name_and_bit(dtype):
    """A sign of zero counts, a weight of the child does not, nor does a parameter that the mask does not name."""
    named = model(dtype=dtype)
    opt = optimizer(named, "D")
    params = dict(named)
    unsigned = (~child_mask().to_dense("embed.weight")).flatten().nonzero()[0]
    with torch.no_grad():
        params["embed.weight"].view(-1)[unsigned] = 0.0
    reference = {name: param.detach().clone() for name, param in named}
    assert changed_outside_child(opt.mask, opt.members(), reference) == {}
    outside = (~child_mask().to_dense("head.weight")).flatten()
    with torch.no_grad():
        params["layer.weight"].add_(1)
        params["head.weight"].view(-1)[~outside] += 1
    assert changed_outside_child(opt.mask, opt.members(), reference) == {}
    with torch.no_grad():
        params["head.weight"].view(-1)[outside.nonzero()[:3]] += 1
    reference["embed.weight"].view(-1)[unsigned] = -0.0
    assert changed_outside_child(opt.mask, opt.members(), reference) == {"embed.weight": 1, "head.weight": 3}


def test_a_reference_that_does_not_fit():
    opt = optimizer(model(), "D")
    reference = {name: param.detach() for name, param in model()}
    for other, got in ((reference["embed.weight"].t(), "(5, 7) torch.float32"),
                       (reference["embed.weight"].half(), "(7, 5) torch.float16")):  # fmt: skip
        with pytest.raises(ValueError) as refusal:
            changed_outside_child(opt.mask, opt.members(), {**reference, "embed.weight": other})
        assert str(refusal.value) == f"reference of 'embed.weight' must be (7, 5) torch.float32, got {got!r}"
