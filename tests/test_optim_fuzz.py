"""Random histories of an optimizer: whatever happens between steps, all implementations agree bitwise, and with fp64.

A history does the same to two optimizers, of the reference and of another implementation. Beside them `shadow.Held`
says what each parameter must hold: a step may take it only where Algorithm 1 in fp64 does, anything else not at all,
or to what its rule says. ``make fuzz`` runs more and longer histories than ``make test``.
"""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import warnings
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import shadow
import torch
from cases import KINDS, MODEL, Guards, state_of, unchanged
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from oracles import philox, same_bits
from shadow import Held
from torch import Tensor
from torch.nn import Parameter

from childtune_kernels import ChildAdamW, ChildMask

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"
#         histories, steps: of each implementation beside the reference, or of that alone
LENGTHS = {"csrc": (160, 20), "reference": (10, 20), "triton": (12, 8)}
LONG_LENGTHS = {"csrc": (3000, 30), "reference": (20, 30), "triton": (30, 8)}
DTYPES = {"fp32": (torch.float32,), "bf16": (torch.bfloat16,), "fp16": (torch.float16,)}
DTYPES["mixed"] = (torch.bfloat16, torch.float32, torch.float16)
LOW = ("master", "kahan", "stochastic")
HYPER = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, reserve_p=1.0, seed=0, maximize=False)
VALUES = {
    "lr": st.sampled_from([0.0, 1e-2, 0.3]),
    "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.95, 0.99)]),
    "eps": st.sampled_from([1e-8, 1e-3]),
    "weight_decay": st.sampled_from([0.0, 0.1, 0.5]),
    "reserve_p": st.sampled_from([0.3, 0.75, 1.0]),
    "seed": st.sampled_from([0, 5, 2**64 - 1]),
    "maximize": st.booleans(),
}
BAD = {
    "lr": st.sampled_from([-1.0, math.nan, "1e-3", torch.ones(2)]),
    "betas": st.sampled_from([(0.9,), (1.0, 0.9), (0.9, -0.1), 0.9]),
    "eps": st.sampled_from([-1e-8, None]),
    "weight_decay": st.sampled_from([-0.1, math.nan]),
    "reserve_p": st.sampled_from([0.0, 1.5, 2.0**-33, math.nan]),
    "seed": st.sampled_from([-1, 2**64, 0.5]),
}
REFUSALS = (RuntimeError, ValueError, TypeError)
COUNTS = (254, 2**24 - 1, 2**24, 2**31 - 1, 2**32 - 2000)
LAYOUTS = {
    "plain": lambda x: x,
    "misaligned": lambda x: Guards().place(x, 3),
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 1],
    "transposed": lambda x: x.t().contiguous().t() if x.dim() == 2 else x,
    "negated": lambda x: torch._neg_view(-x),
}
picks = st.integers(0, 999)  # reduced to what there is at that moment


def a_hyper(sampled: bool) -> st.SearchStrategy[dict]:
    keys = [key for key in VALUES if sampled or key != "reserve_p"]
    return st.fixed_dictionaries({key: VALUES[key] for key in keys}).map(lambda drawn: {**HYPER, **drawn})


@st.composite
def plans(draw) -> dict:
    """Options that go together, and the hyper-parameters of one to three groups."""
    kind = draw(st.sampled_from((*KINDS, "F")))
    packed, dense = kind in ("D", "F in D"), kind in ("D, dense", "D, decay all")
    way = draw(st.sampled_from(("by hand", "backward", "fused", *(("packed",) * (4 * packed)))))
    return dict(
        kind=kind,
        way=way,
        options=dict(
            dialect=draw(st.sampled_from(["torch", "hf"])),
            decay="all" if kind == "D, decay all" else "child",
            state_dtype=draw(st.sampled_from(list(DTYPES["mixed"]))),
            low_precision=draw(st.none() | st.sampled_from(["nearest", *(() if dense else LOW)])),
            max_grad_norm=draw(st.sampled_from([None, math.inf, *(() if way == "fused" else (0.5, 20.0))])),
            pack_gradients=way == "packed",
            fused_backward=way == "fused",
        ),
        dtype=draw(st.sampled_from(list(DTYPES))),
        named=draw(st.booleans()),
        hypers=draw(st.lists(a_hyper("F" in kind), min_size=1, max_size=3)),
        densities=draw(st.tuples(*[st.sampled_from([None, 0.0, 0.3, 1.0])] * len(MODEL))),
    )


class Twin:
    """One optimizer and its parameters, by name."""

    def __init__(self, impl: str, params: dict[str, Parameter]):
        self.impl, self.params = impl, params
        self.opt: ChildAdamW | None = None

    def entry(self, name: str) -> dict:
        return self.opt.state.get(self.params[name]) or {}


class Histories(RuleBasedStateMachine):
    """What may happen to an optimizer. A rule that ends with ``then`` takes a plain step at once."""

    place = None

    # ---- what there is ----------------------------------------------------------------------------------------------

    @initialize(plan=plans())
    def begin(self, plan):
        self.plan, self.options, self.way = plan, plan["options"], plan["way"]
        self.steps = self.added = 0
        self.lost: list[Tensor] = []  # memory that was the state's, and may be anybody's by now
        names = list(MODEL) if plan["named"] else [str(i) for i in range(len(MODEL))]
        shapes = dict(zip(names, MODEL.values(), strict=True))
        self.groups = [(dict(hyper), names[i :: len(plan["hypers"])]) for i, hyper in enumerate(plan["hypers"])]
        if not plan["named"]:  # positions are names: the groups' order must be the names'
            self.groups = [(hyper, []) for hyper, _ in self.groups]
            for i, name in enumerate(names):
                self.groups[i * len(self.groups) // len(names)][1].append(name)
        generator = torch.Generator().manual_seed(2)
        dtypes = DTYPES[plan["dtype"]]
        values = {
            n: torch.randn(s, generator=generator).to(dtypes[i % len(dtypes)])
            for i, (n, s) in enumerate(shapes.items())
        }
        self.children = self._drawn_children(plan["densities"], values) if "D" in plan["kind"] else None
        self.dense = plan["kind"] in ("D, dense", "D, decay all")
        impls = dict.fromkeys(("reference", self.place.impl))
        self.twins = [
            Twin(i, {n: Parameter(v.clone().to(self.place.device)) for n, v in values.items()}) for i in impls
        ]
        for twin in self.twins:
            twin.opt = self._made(twin, self.groups)
        self.held = {name: self._read(self.twins[0], name) for name in names}

    def _drawn_children(self, densities, values, seed: int = 3) -> dict[str, Tensor]:
        """A child with at least one weight; where no density is given, the mask does not name the parameter."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {n: torch.rand(x.shape, generator=generator) for n, x in values.items()}
        rows = zip(drawn.items(), densities, strict=False)
        children = {n: x < density for (n, x), density in rows if density is not None}
        if not any(child.any() for child in children.values()):
            last = list(drawn)[-1]
            children[last] = drawn[last] < 0.3
        return children

    def _mask(self) -> ChildMask | None:
        return None if self.children is None else ChildMask.from_dense(self.children)

    def _made(self, twin: Twin, groups) -> ChildAdamW:
        """A new optimizer of these parameters and groups."""
        entries = [{**hyper, "params": self._entries(twin, names)} for hyper, names in groups]
        state = "dense" if self.dense else None
        return ChildAdamW(entries, mask=self._mask(), state=state, impl=twin.impl, **self.options)

    def _entries(self, twin: Twin, names: list[str]) -> list:
        return [(name, twin.params[name]) if self.plan["named"] else twin.params[name] for name in names]

    def _child(self, name: str) -> Tensor:
        whole = torch.ones(self.twins[0].params[name].shape, dtype=torch.bool)
        return whole if self.children is None else self.children.get(name, whole)

    def _read(self, twin: Twin, name: str) -> Held:
        child = self._child(name)
        return Held.of(twin.params[name], twin.entry(name), child, self.options["state_dtype"])

    def _mode(self) -> str:
        sampled = self.children is None and any(hyper["reserve_p"] < 1 for hyper, _ in self.groups)
        packed = self.children is not None and not self.dense
        return self.options["low_precision"] or ("stochastic" if sampled else "master" if packed else "nearest")

    def _picked(self, pick: int, names=None) -> str:
        names = list(self.held) if names is None else names
        return names[pick % len(names)]

    @property
    def hooked(self) -> bool:
        return self.way in ("fused", "packed")

    # ---- what always holds ------------------------------------------------------------------------------------------

    @invariant()
    def everything_is_as_it_must_be(self):
        if not hasattr(self, "held"):
            return
        for name, held in self.held.items():
            got = self._read(self.twins[-1], name)
            for what in ("w", "m", "v"):
                assert same_bits(getattr(got, what), getattr(held, what)), f"{what} of {name} changed"
            assert got.t == held.t, f"step of {name}: {got.t} instead of {held.t}"
            child = self._child(name)  # outside, there is no companion
            assert same_bits(got.standing()[child], held.standing()[child]), f"companion of {name} changed"
            held.companion = got.companion  # it may have been made, of the same weights
        assert all((old == 7).all() for old in self.lost), "memory was written that is no longer the optimizer's"
        first, last = self.twins[0], self.twins[-1]
        assert unchanged(first.params.values(), last.params.values())
        states = [[(k, *t.shape) for e in twin.opt.state.values() for k, t in e.items()] for twin in (first, last)]
        assert sorted(states[0]) == sorted(states[1]) and unchanged(state_of(first.opt), state_of(last.opt))
        for twin in self.twins:
            assert twin.opt.low_precision == self._mode()
            assert twin.opt.describe() and twin.opt.memory().state >= 0
            for (hyper, names), group in zip(self.groups, twin.opt.param_groups, strict=True):
                assert {key: group[key] for key in hyper} == hyper
                assert [id(p) for p in group["params"]] == [id(twin.params[n]) for n in names]

    # ---- steps ------------------------------------------------------------------------------------------------------

    def _gradients(self, scale: float = 1.0, without=()) -> dict[str, Tensor]:
        """New gradients, different at each call, on the CPU."""
        self.steps += 1
        generator = torch.Generator().manual_seed(self.steps)
        grads = {n: (torch.randn(h.w.shape, generator=generator) * scale).to(h.w.dtype) for n, h in self.held.items()}
        return {n: g for n, g in grads.items() if n not in without}

    def _give(self, twin: Twin, grads: dict[str, Tensor], layout: str = "plain", by_hand: bool | None = None) -> None:
        """Let the parameters have gradients, by hand or by a backward pass; these are added to what there is."""
        grads = {n: LAYOUTS[layout](g.to(self.place.device)) for n, g in grads.items()}
        if self.way == "by hand" if by_hand is None else by_hand:
            for name, grad in grads.items():
                param = twin.params[name]
                param.grad = grad if param.grad is None else param.grad + grad
        elif grads:
            with torch.enable_grad():
                sum((twin.params[n] * g).sum() for n, g in grads.items()).backward()

    def _clear(self) -> None:
        for twin in self.twins:
            for param in twin.params.values():
                param.grad = None
            twin.opt.zero_grad()

    def _norm(self, grads: dict[str, Tensor]) -> float:
        """Of what is clipped: all gradients, or where they are packed, the child's."""
        parts = [g[self._child(n)] if self.way == "packed" else g for n, g in grads.items()]
        return math.sqrt(sum(part.double().square().sum().item() for part in parts))

    def _took(self, grads: dict[str, Tensor], scale: float = 1.0) -> None:
        """Hold a step with these gradients to Algorithm 1."""
        clipping = dict(factor=1 / scale)
        most = self.options["max_grad_norm"]
        if most is not None and most < math.inf and grads:
            clip = most / (self._norm(grads) / scale + 1e-6)
            numel = sum(g.numel() for g in grads.values())
            clipping = dict(factor=min(clip, 1.0) / scale, factor_roundings=numel)  # the norm's sum, in any order
        for hyper, names in self.groups:
            for name in set(names) & grads.keys():
                before, after, child = self.held[name], self._read(self.twins[-1], name), self._child(name)
                keep = torch.ones_like(child)
                if hyper["reserve_p"] < 1:
                    step = min(before.t + 1, 2**32 - 1)
                    keep = shadow.keep_bits(name, hyper["seed"], step, hyper["reserve_p"], child.shape)
                options = {key: self.options[key] for key in ("decay", "dialect")}
                options["stochastic"] = self._mode() == "stochastic" and after.w.dtype != torch.float32
                shadow.check_step(
                    name, before, after, grads[name], hyper, keep=keep, child=child, **options, **clipping
                )
                for twin in self.twins:
                    assert torch.equal(twin.opt.mask_at(before.t + 1, name).cpu(), keep & child)
        for twin in self.twins if self.children is not None and self.options["decay"] == "child" else ():
            now = {name: param.detach().cpu() for name, param in twin.params.items()}
            twin.opt.assert_frozen({n: torch.where(h.w.isnan(), now[n], h.w) for n, h in self.held.items()})
        for name in grads:
            self.held[name] = self._read(self.twins[-1], name)
            wanted = (
                {"master": "float32", "kahan": None}.get(self._mode(), "")
                if self.held[name].w.dtype != torch.float32
                else ""
            )
            companion = self.held[name].companion
            assert (companion is None) == (wanted == ""), f"{name} has companion {companion}"

    def _plain_step(self, then: bool = True) -> None:
        if then:
            grads = self._gradients()
            for twin in self.twins:
                self._give(twin, grads)
                twin.opt.step()
            self._took(grads)
            self._clear()

    @rule(
        scale=st.sampled_from([1.0, 1e-4, 300.0]),
        layout=st.sampled_from(list(LAYOUTS)),
        without=st.sets(picks.map(lambda i: i % 5), max_size=4),
        special=st.sampled_from([None, None, math.inf, math.nan]),
        passes=st.sampled_from([1, 2]),
        dropped=st.sampled_from([None, True, False]),
        closure=st.booleans(),
        other_way=st.booleans(),
    )
    def step(self, scale, layout, without, special, passes, dropped, closure, other_way):
        names = list(self.held)
        rounds = [self._gradients(scale, {names[i] for i in without}) for _ in range(1 if self.hooked else passes)]
        if self.way == "packed" and not other_way and passes == 2:
            rounds.append(self._gradients(scale, {names[i] for i in without}))
        if special is not None and rounds[0] and not self._clips():
            list(rounds[0].values())[0].view(-1)[-1] = special
        grads = dict(rounds[0])
        for more in rounds[1:]:
            grads = {n: g + more[n] for n, g in grads.items()}
        earlier = self._gradients()
        if dropped is False and self.way != "fused":
            grads = {n: grads.get(n, torch.zeros_like(g)) for n, g in earlier.items()}
        by_hand = not other_way if self.way == "by hand" else other_way
        by_hand = by_hand and not (self.hooked and dropped is False)  # there a gradient is packed already
        for twin in self.twins:
            if dropped is not None and self.way != "fused":
                self._give(twin, earlier)
                twin.opt.zero_grad(set_to_none=dropped)

            def evaluate(twin=twin):
                for each in rounds:
                    self._give(twin, each, layout, by_hand)
                return 1.5

            if closure:
                assert twin.opt.step(evaluate) == 1.5
            else:
                evaluate()
                assert twin.opt.step() is None
        self._took(grads)
        if self.hooked:  # used up by the step: Trainer clears p.grad alone
            for twin in self.twins:
                for param in twin.params.values():
                    param.grad = None
                twin.opt.step()
        self._clear()

    def _clips(self) -> bool:
        return self.options["max_grad_norm"] not in (None, math.inf)

    @rule(scale=st.sampled_from([1.0, 4.0, 1000.0]), found_inf=st.booleans(), bad=st.booleans())
    def scaled_step(self, scale, found_inf, bad):
        grads = self._gradients(scale)
        if bad and found_inf:
            list(grads.values())[0].view(-1)[0] = math.inf
        for twin in self.twins:
            twin.opt.grad_scale = torch.tensor(scale, device=self.place.device)
            twin.opt.found_inf = torch.tensor(float(found_inf), device=self.place.device)
            if self.hooked:
                with pytest.raises(RuntimeError, match="GradScaler"):
                    twin.opt.step()
            else:
                self._give(twin, grads)
                twin.opt.step()
            del twin.opt.grad_scale, twin.opt.found_inf
        if not self.hooked and not found_inf:
            self._took(grads, scale)
        self._clear()

    # ---- hyper-parameters and groups --------------------------------------------------------------------------------

    @rule(pick=picks, drawn=st.sampled_from(list(VALUES)).flatmap(lambda k: st.tuples(st.just(k), VALUES[k])),
          tensor=st.booleans(), then=st.booleans())  # fmt: skip
    def change_a_hyper_parameter(self, pick, drawn, tensor, then):
        (key, value), i = drawn, pick % len(self.groups)
        if key == "reserve_p" and (self.dense and self.children is not None):
            return
        if key == "lr" and tensor:
            value = torch.tensor(value, device=self.place.device)
        self.groups[i][0][key] = value
        for twin in self.twins:
            twin.opt.param_groups[i][key] = value
        self._plain_step(then)

    @rule(pick=picks, drawn=st.sampled_from(list(BAD)).flatmap(lambda k: st.tuples(st.just(k), BAD[k])))
    def bad_hyper_parameters_are_refused(self, pick, drawn):
        (key, value), i = drawn, pick % len(self.groups)
        grads = self._gradients()
        for twin in self.twins:
            good, twin.opt.param_groups[i][key] = twin.opt.param_groups[i][key], value
            with pytest.raises(REFUSALS, match=key.removesuffix("s")):
                self._give(twin, grads)
                twin.opt.step()
            twin.opt.param_groups[i][key] = good
        self._clear()

    @rule(origin=picks, goal=picks, pick=picks, then=st.booleans())
    def move_a_parameter(self, origin, goal, pick, then):
        i, j = origin % len(self.groups), goal % len(self.groups)
        if not self.groups[i][1] or i == j:
            return
        k = pick % len(self.groups[i][1])

        def move(i, k, j, at):
            for twin in self.twins:
                twin.opt.param_groups[j]["params"].insert(at, twin.opt.param_groups[i]["params"].pop(k))
            self.groups[j][1].insert(at, self.groups[i][1].pop(k))

        move(i, k, j, 0)
        sampled = any(hyper["reserve_p"] < 1 for hyper, _ in self.groups)
        if self.plan["named"]:
            self._plain_step(then)
        elif self.children is not None or sampled or self._mode() == "stochastic":
            names = [name for _, own in self.groups for name in own]
            if names != list(self.held):
                for twin in self.twins:
                    with pytest.raises(RuntimeError, match="positions"):
                        self._give(twin, self._gradients())
                        twin.opt.step()
                self._clear()
            move(j, 0, i, k)
        else:
            move(j, 0, i, k)

    @rule()
    def remove_an_empty_group(self):
        empty = [i for i, (_, names) in enumerate(self.groups) if not names]
        if empty:
            del self.groups[empty[0]]
            for twin in self.twins:
                del twin.opt.param_groups[empty[0]]
            self._plain_step()

    @precondition(lambda self: self.added < 2)
    @rule(data=st.data(), then=st.booleans())
    def add_a_group(self, data, then):
        hyper = data.draw(a_hyper("F" in self.plan["kind"]))
        name = f"extra{self.added}.weight" if self.plan["named"] else str(len(self.held))
        self.added += 1
        values = torch.randn(9, 4, generator=torch.Generator().manual_seed(self.added)).to(
            next(iter(self.held.values())).w.dtype
        )
        self.groups.append((dict(hyper), [name]))
        for twin in self.twins:
            twin.params[name] = Parameter(values.clone().to(self.place.device))
            twin.opt.add_param_group({**hyper, "params": self._entries(twin, [name])})
        zeros = torch.zeros(values.shape, dtype=self.options["state_dtype"])
        self.held[name] = Held(values.clone(), zeros, zeros.clone())
        self._plain_step(then)

    # ---- another child ----------------------------------------------------------------------------------------------

    @rule(densities=st.tuples(*[st.sampled_from([None, 0.0, 0.3, 1.0])] * len(MODEL)), seed=picks, none=st.booleans(),
          then=st.booleans())  # fmt: skip
    def set_mask(self, densities, seed, none, then):
        values = {name: held.w for name, held in self.held.items()}
        children = None if none else self._drawn_children(densities, values, seed)
        refused = (none and self.way == "packed") or (not none and self.options["decay"] == "all")
        mask = None if none else ChildMask.from_dense(children)
        for twin in self.twins:
            if refused:
                with pytest.raises(ValueError):
                    twin.opt.set_mask(mask)
            else:
                twin.opt.set_mask(mask)
        if refused:
            return
        mode, old = self._mode(), {name: self._child(name) for name in self.held}
        self.children, self.dense = children, False
        for name, held in self.held.items():
            self.held[name] = held.of_child(old[name], self._child(name), companions=self._mode() == mode)
        self._plain_step(then)

    # ---- to disk and back -------------------------------------------------------------------------------------------

    @rule(
        how=st.sampled_from(["own", "twin", "saved", "wrapped", "fresh", "torch", "copy", "pickle"]), then=st.booleans()
    )
    def reload(self, how, then):
        if how in ("fresh", "torch") and self.plan["named"] and not all(names for _, names in self.groups):
            how = "own"  # torch makes no optimizer of an empty group beside named ones
        states = [twin.opt.state_dict() for twin in self.twins]
        if how == "twin":
            states.reverse()
        for twin, state in zip(self.twins, states, strict=True):
            if how in ("saved", "fresh"):
                buffer = io.BytesIO()
                torch.save(state, buffer)
                state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
            if how == "wrapped":
                state = copy.deepcopy(state)
                for group in state["param_groups"] if self.plan["named"] else ():
                    group["param_names"] = [f"module._orig_mod.{name}" for name in group["param_names"]]
            if how == "fresh":
                twin.opt = None  # hooks allow no second owner
                twin.opt = self._made(twin, [({**HYPER}, names) for _, names in self.groups])
            if how == "torch":
                state = self._through_torch(twin)
            if how in ("copy", "pickle"):
                both = (twin.params, twin.opt)
                twin.params, twin.opt = copy.deepcopy(both) if how == "copy" else pickle.loads(pickle.dumps(both))
            else:
                twin.opt.load_state_dict(state)
                apart = how in ("saved", "fresh", "wrapped")
                for key, tensor in [item for entry in state["state"].values() for item in entry.items()]:
                    if apart or key == "child":
                        tensor.fill_(7)  # the optimizer has copies of these
        self._plain_step(then)

    def _through_torch(self, twin: Twin) -> dict:
        """The state after torch's AdamW has had it: moments in the weights' dtype, counters in fp32, no companions."""
        adam = torch.optim.AdamW([{"params": self._entries(twin, names)} for _, names in self.groups])
        adam.load_state_dict(twin.opt.dense_state_dict())
        if twin is self.twins[0]:
            for name, held in self.held.items():
                m, v = (x.to(held.w.dtype).to(x.dtype) for x in (held.m, held.v))
                self.held[name] = replace(held, m=m, v=v, t=int(np.float32(held.t)), companion=None)
        return adam.state_dict()

    # ---- tensors that are replaced ----------------------------------------------------------------------------------

    @rule(name=st.sampled_from(list(DTYPES)), then=st.booleans())
    def cast(self, name, then):
        dtypes = DTYPES[name]
        for i, (name, held) in enumerate(self.held.items()):
            dtype, companion = dtypes[i % len(dtypes)], held.companion
            sixteen = torch.float32 not in (dtype, held.w.dtype)
            stays = sixteen and companion is not None and companion.dtype in (torch.float32, dtype)
            self.held[name] = replace(held, w=held.w.to(dtype), companion=companion if stays else None)
            for twin in self.twins:
                twin.params[name].data = twin.params[name].data.to(dtype)
        # a step drops the companions of fp32 weights, and the compensations of other dtypes
        self._plain_step(then or torch.float32 in dtypes or self._mode() == "kahan")

    @rule(pick=picks, layout=st.sampled_from(list(LAYOUTS)), other=st.booleans(), then=st.booleans())
    def replace_weights(self, pick, layout, other, then):
        name = self._picked(pick)
        held = self.held[name]
        if other:
            generator = torch.Generator().manual_seed(pick)
            values = torch.randn(held.w.shape, generator=generator).to(held.w.dtype)
            self.held[name] = replace(held, w=torch.where(values > 0.5, values, held.w))
        for twin in self.twins:
            twin.params[name].data = LAYOUTS[layout](self.held[name].w.clone().to(self.place.device))
        self._plain_step(then)

    @rule(pick=picks, key=picks, way=st.sampled_from(["data", "misaligned", "replaced"]), then=st.booleans())
    def move_state(self, pick, key, way, then):
        name = self._picked(pick)
        for twin in self.twins:
            if entry := twin.entry(name):
                own = self._picked(key, sorted(entry))
                moved = Guards().place(entry[own], 3) if way == "misaligned" else entry[own].clone()
                if way == "replaced":
                    entry[own] = moved
                else:
                    self.lost.append(entry[own].data.view_as(entry[own]))
                    entry[own].data = moved
                    self.lost[-1].fill_(7)
        self._plain_step(then)

    @rule(pick=picks, deleted=st.booleans(), then=st.booleans())
    def forget_an_entry(self, pick, deleted, then):
        name = self._picked(pick)
        held = self.held[name]
        self.held[name] = Held(held.w, torch.zeros_like(held.m), torch.zeros_like(held.v))
        for twin in self.twins:
            if param_entry := twin.entry(name):
                twin.opt.state.pop(twin.params[name]) if deleted else param_entry.clear()
        self._plain_step(then)

    @rule(pick=picks, count=st.sampled_from(COUNTS), as_torch=st.booleans(), then=st.booleans())
    def count_on_from(self, pick, count, as_torch, then):
        name = self._picked(pick)
        as_torch = as_torch and int(np.float32(count)) == count
        for twin in self.twins:
            if entry := twin.entry(name):
                dtype = torch.float32 if as_torch else torch.float64
                entry["step"] = torch.tensor(count, dtype=dtype, device=self.place.device)
                self.held[name] = replace(self.held[name], t=count)
        self._plain_step(then)

    # ---- what is refused before anything changes --------------------------------------------------------------------

    @rule(pick=picks, what=st.sampled_from(["sparse", "smaller", "larger", "moment", "lost", "dtype"]))
    def what_does_not_fit_is_refused(self, pick, what):
        name = self._picked(pick, [name for name, held in self.held.items() if held.w.dim()])
        for twin in self.twins:
            param, entry = twin.params[name], twin.entry(name)
            if what in ("moment", "lost") and not entry:
                continue
            good, kept = param.data, dict(entry)
            moment = entry["exp_avg_sq"].data if entry else None
            if what == "smaller":
                param.data = good[:1]
            elif what == "larger":
                param.data = torch.cat([good, good])
            elif what == "dtype":
                param.data = good.double()
            elif what == "moment":
                entry["exp_avg_sq"].data = torch.cat([moment.view(-1)] * 2 + [moment.new_zeros(1)])
            elif what == "lost":
                del entry["exp_avg"]
            if not entry and what in ("smaller", "larger") and name not in (self.children or ()):
                param.data = good  # nothing is known of it yet, and nothing refuses it
                continue
            param.grad = torch.ones_like(param).to_sparse() if what == "sparse" else torch.ones_like(param)
            with pytest.raises(REFUSALS):
                twin.opt.step()
            param.grad = None
            param.data = good
            if what == "moment":
                entry["exp_avg_sq"].data = moment
            if what == "lost":
                entry.clear()
                entry.update(kept)
        self._clear()


def test_the_shadows_philox_is_philox():
    """... as it is written in Python integers elsewhere."""
    counters = [0, 1, 77, 2**32 + 5, 2**64 - 1]
    for key, step in ((0, 1), (2**64 - 1, 2**32 - 1), (0x0123456789ABCDEF, 2**24)):
        got = shadow.philox(np.array(counters, dtype=np.uint64), step, key)
        wanted = [philox((c % 2**32, c >> 32, step, 0), (key % 2**32, key >> 32)) for c in counters]
        assert got.tolist() == [list(words) for words in wanted]


def test_histories(place, one_thread):
    """A failure prints the history that leads to it; `make fuzz` makes it as short as possible."""
    histories, steps = (LONG_LENGTHS if LONG else LENGTHS)[place.impl]
    machine = type("Histories", (Histories,), {"place": place})
    warnings.simplefilter("ignore")  # clipping from outside, hyper-parameters from a state
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=histories,
            stateful_step_count=steps,
            deadline=None,
            derandomize=not LONG,
            database=None,
            report_multiple_bugs=False,
            phases=[Phase.generate, *([Phase.shrink] * LONG)],  # shrinking takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
