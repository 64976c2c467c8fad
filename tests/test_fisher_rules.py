"""Which calls have a rule, by every name and form they have in torch; their squares in few bits and few examples."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_fisher import alone, assert_same, one_by_one
from torch import Tensor, nn

from childtune_kernels.fisher import estimate_fisher, rules
from childtune_kernels.fisher.exact import Captured, Exact, Losses, square_into
from childtune_kernels.fisher.tape import Output, Tape, find_layout

EXAMPLES, POSITIONS, WIDTH = 3, 4, 6


class Call(nn.Module):
    """One function of an input [B, T, 6], or [T, B, 6], and parameters of some shapes, by name."""

    def __init__(self, function, shapes: dict[str, tuple[int, ...]], second: bool = False):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=draw).double()))
        self.names, self.function, self.second = list(shapes), function, second

    def forward(self, x):
        out = self.function(x.transpose(0, 1) if self.second else x, *(getattr(self, name) for name in self.names))
        return out.transpose(0, 1) if self.second else out


def loss(model, batch):
    return model(batch["x"]).tanh().flatten(1).square().sum(1)


def batch_of(*shape: int) -> dict[str, Tensor]:
    x = torch.randn(EXAMPLES, *shape, generator=torch.Generator().manual_seed(2)).double()
    return {"x": x, "labels": torch.zeros(EXAMPLES)}


def assert_notes(function, shapes, batch, notes: dict[str, str], second: bool = False):
    """The batched pass alone, unmended by its check, must be right and by the named rules."""
    model = Call(function, shapes, second)
    fisher = estimate_fisher(model, [batch], loss, check=False)
    assert fisher.notes == notes
    assert_same(fisher, one_by_one(model, [batch], loss))


W, TURNED, B = {"w": (5, WIDTH)}, {"w": (WIDTH, 5)}, {"b": (5,)}
HEADS = {"w": (2, 3, 5)}
SHIFT, SCALE = {"w": "shift"}, {"w": "scale"}
PRODUCT, LINEAR = {"w": "product"}, {"w": "product", "b": "bias"}
# name -> function, shapes of the parameters, how each is treated
RULED = {
    "linear": (F.linear, W, PRODUCT),
    "linear with bias": (F.linear, W | B, LINEAR),
    "linear by keyword": (lambda x, w, b: F.linear(x, weight=w, bias=b), W | B, LINEAR),
    "linear by keywords": (lambda x, w: F.linear(input=x, weight=w), W, PRODUCT),
    "linear of every other": (lambda x, w: F.linear(x[..., ::2], w), {"w": (5, 3)}, PRODUCT),
    "linear of one": (lambda x, w: F.linear(x[..., 3:4], w), {"w": (5, 1)}, PRODUCT),
    "torch.matmul": (torch.matmul, TURNED, PRODUCT),
    "matmul by keyword": (lambda x, w: torch.matmul(x, other=w), TURNED, PRODUCT),
    "Tensor.matmul": (lambda x, w: x.matmul(w), TURNED, PRODUCT),
    "@": (lambda x, w: x @ w, TURNED, PRODUCT),
    "einsum": (lambda x, w: torch.einsum("bti,io->bto", x, w), TURNED, PRODUCT),
    "einsum, list": (lambda x, w: torch.einsum("bti, oi -> bto", [x, w]), W, PRODUCT),
    "einsum, numbers": (lambda x, w: torch.einsum(x, [0, 1, 2], w, [2, 3], [0, 1, 3]), TURNED, PRODUCT),
    "einsum, heads out": (
        lambda x, w: torch.einsum("bti,ihd->bthd", x, w).flatten(2), {"w": (WIDTH, 2, 3)}, PRODUCT,
    ),
    "einsum, heads out first": (
        lambda x, w: torch.einsum("bti,hdi->bthd", x, w).flatten(2), {"w": (2, 3, WIDTH)}, PRODUCT,
    ),
    "einsum, heads in": (lambda x, w: torch.einsum("bthd,hdo->bto", x.unflatten(2, (2, 3)), w), HEADS, PRODUCT),
    "einsum, heads in last": (
        lambda x, w: torch.einsum("bthd,ohd->bto", x.unflatten(2, (2, 3)), w), {"w": (5, 2, 3)}, PRODUCT,
    ),
    "einsum, mixed": (
        lambda x, w: torch.einsum("bthd,dho->bto", x.unflatten(2, (2, 3)), w), {"w": (3, 2, 5)}, {"w": "einsum"},
    ),
    "einsum, out in between": (
        lambda x, w: torch.einsum("bti,io->bot", x, w).mT, TURNED, {"w": "einsum"},
    ),
    "einsum, a head each": (
        lambda x, w: torch.einsum("bthd,hde->bthe", x.unflatten(2, (2, 3)), w).flatten(2), HEADS, {"w": "einsum"},
    ),
    "einsum, elementwise": (lambda x, w: torch.einsum("bti,i->bti", x, w), {"w": (WIDTH,)}, {"w": "einsum"}),
    "layer norm": (
        lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b, 0.5), {"w": (WIDTH,), "b": (WIDTH,)},
        {"w": "norm", "b": "shift"},
    ),
    "layer norm of its own eps": (
        lambda x, w, b: F.layer_norm(x * 1e-3, (WIDTH,), w, b), {"w": (WIDTH,), "b": (WIDTH,)},
        {"w": "norm", "b": "shift"},
    ),
    "layer norm without bias": (lambda x, w: F.layer_norm(x, (WIDTH,), w, eps=0.5), {"w": (WIDTH,)}, {"w": "norm"}),
    "layer norm without weight": (
        lambda x, b: F.layer_norm(x, (WIDTH,), None, b), {"b": (WIDTH,)}, {"b": "shift"},
    ),
    "rms norm": (lambda x, w: F.rms_norm(x, (WIDTH,), w, 0.5), {"w": (WIDTH,)}, {"w": "norm"}),
    "rms norm of its own eps": (lambda x, w: F.rms_norm(x * 1e-9, [WIDTH], w), {"w": (WIDTH,)}, {"w": "norm"}),
    "torch.add": (torch.add, {"w": (WIDTH,)}, SHIFT),
    "Tensor.add": (lambda x, w: x.add(w), {"w": (WIDTH,)}, SHIFT),
    "added": (lambda x, w: w + x, {"w": (1, WIDTH)}, SHIFT),
    "added to a column": (lambda x, w: x + w, {"w": (1, 1, 1)}, SHIFT),
    "added everywhere": (lambda x, w: x + w, {"w": ()}, SHIFT),
    "torch.mul": (torch.mul, {"w": (WIDTH,)}, SCALE),
    "Tensor.mul": (lambda x, w: w.mul(x), {"w": (WIDTH,)}, SCALE),
    "multiplied": (lambda x, w: x * w, {"w": (1, 1, WIDTH)}, SCALE),
    "multiplied by a column": (lambda x, w: x[..., :1] * w, {"w": (WIDTH,)}, SCALE),
    "multiplied everywhere": (lambda x, w: w * x, {"w": ()}, SCALE),
    "by a number's shift": (lambda x, w: x * w + w, {"w": (WIDTH,)}, {"w": "scale + shift"}),
    "twice by a product": (lambda x, w: F.linear(F.linear(x, w), w), {"w": (WIDTH, WIDTH)}, PRODUCT),
    "both ways by a product": (lambda x, w: F.linear(x, w) @ w, {"w": (WIDTH, WIDTH)}, PRODUCT),
    "a product and a shift": (
        lambda x, w: F.linear(x, w) + w[0], {"w": (WIDTH, WIDTH)},
        {"w": "one example at a time: no rule for __getitem__"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("second", [False, True], ids=["examples-first", "examples-second"])
@pytest.mark.parametrize("form", RULED)
def test_rules(form, second):
    function, shapes, notes = RULED[form]
    assert_notes(function, shapes, batch_of(POSITIONS, WIDTH), notes, second)


FLAT = {
    "linear": (F.linear, W | B, LINEAR),
    "torch.mm": (torch.mm, TURNED, PRODUCT),
    "Tensor.mm": (lambda x, w: x.mm(w), TURNED, PRODUCT),
    "addmm": (lambda x, b, w: torch.addmm(b, x, w), B | TURNED, LINEAR),
    "einsum of vectors": (lambda x, w: torch.einsum("bi,oi->bo", x, w), W, PRODUCT),
    "expanded": (lambda x, w: x * w.expand(len(x), -1), {"w": (1, WIDTH)}, SHIFT),
}


@pytest.mark.parametrize("form", FLAT)
def test_rules_for_rows(form):
    assert_notes(*FLAT[form][:2], batch_of(WIDTH), FLAT[form][2])


@pytest.mark.parametrize("padding_idx", [None, 0, 2, -1])
@pytest.mark.parametrize("second", [False, True], ids=["examples-first", "examples-second"])
def test_rules_for_embeddings(second, padding_idx):
    """Ids that come twice in an example; the padding's row, counted from either end, has no information."""
    ids = torch.tensor([[0, 1, 1, 2], [4, 4, 4, 0], [2, 3, 4, 4]])
    batch = {"x": ids, "labels": torch.zeros(3)}
    for call in (
        lambda x, w: F.embedding(x, w, padding_idx),
        lambda x, w: F.embedding(input=x, weight=w, padding_idx=padding_idx, sparse=True),
    ):
        assert_notes(call, {"w": (5, WIDTH)}, batch, {"w": "embedding"}, second)


@pytest.mark.parametrize(
    "options",
    [{}, dict(stride=2), dict(padding=(1, 0)), dict(dilation=(1, 2), groups=1), dict(stride=(2, 1), padding=2)],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_rules_for_convolutions(options, bias):
    shapes, notes = {"w": (4, 2, 3, 2)}, {"w": "convolution"}
    if bias:
        shapes, notes = {**shapes, "b": (4,)}, {**notes, "b": "bias"}
    for conv in (F.conv2d, torch.conv2d):
        assert_notes(lambda x, *own, conv=conv: conv(x, *own, **options), shapes, batch_of(2, 6, 7), notes)


def no_rule(*names: str, call: str) -> dict[str, str]:
    return {name: f"one example at a time: no rule for {call}" for name in names}


SQUARE, TWO = {"w": (WIDTH, WIDTH)}, {"w": (WIDTH,), "v": (WIDTH,)}
# Calls of a form that no rule is for: another order, other options, names of arguments that handlers do not know.
UNRULED = {
    "parameter first": (lambda x, w: w @ x.mT, W, no_rule("w", call="matmul")),
    "parameter as input": (lambda x, w: x + F.linear(w, torch.ones(WIDTH, WIDTH).double()), {"w": (WIDTH,)},
                           no_rule("w", call="linear")),
    "vector": (lambda x, w: x @ w, {"w": (WIDTH,)}, no_rule("w", call="matmul")),
    "linear of a vector": (F.linear, {"w": (WIDTH,)}, no_rule("w", call="linear")),
    "batched": (lambda x, w: (x.transpose(0, 1) @ w).transpose(0, 1), {"w": (POSITIONS, WIDTH, 5)},
                no_rule("w", call="matmul")),
    "computed weight": (lambda x, w, b: F.linear(x, w.exp(), b), W | B,
                        no_rule("w", call="exp") | no_rule("b", call="linear")),
    "computed bias": (lambda x, w, b: F.linear(x, w, b.exp()), W | B,
                      no_rule("w", call="linear") | no_rule("b", call="exp")),
    "computed scale": (lambda x, w, v: F.layer_norm(x, (WIDTH,), w.exp(), v), TWO,
                       no_rule("w", call="exp") | no_rule("v", call="layer_norm")),
    "computed shift": (lambda x, w, v: F.layer_norm(x, (WIDTH,), w, v.exp()), TWO,
                       no_rule("w", call="layer_norm") | no_rule("v", call="exp")),
    "two parameters": (lambda x, w, v: x + torch.add(w, v), TWO, no_rule("w", "v", call="add")),
    "in a list": (lambda x, w, v: x + torch.stack([w, v]).sum(0), TWO, no_rule("w", "v", call="stack")),
    "shifted twice": (lambda x, w: torch.add(x, w, alpha=2), {"w": (WIDTH,)}, no_rule("w", call="add")),
    "by a number": (lambda x, w: x * (w * 2.0), {"w": (WIDTH,)}, {"w": "one example at a time: an output without an "
                    "example dimension"}),
    "a row by a number": (lambda x, w: x * (2.0 * w), {"w": (1, WIDTH)}, {"w": "one example at a time: an output "
                          "without an example dimension"}),
    "einsum, ellipsis": (lambda x, w: torch.einsum("...i,io->...o", x, w), TURNED, no_rule("w", call="einsum")),
    "einsum, no arrow": (lambda x, w: torch.einsum("bti,io", x, w), TURNED, no_rule("w", call="einsum")),
    "einsum, parameter first": (lambda x, w: torch.einsum("io,bti->bto", w, x), TURNED, no_rule("w", call="einsum")),
    "einsum, an index alone": (lambda x, w: torch.einsum("bti,io->bti", x, w), TURNED, no_rule("w", call="einsum")),
    "einsum, diagonal": (lambda x, w: torch.einsum("bti,ii->bti", x, w), SQUARE, no_rule("w", call="einsum")),
    "einsum, trace": (lambda x, w: torch.einsum("bii,io->bo", x[:, :, :POSITIONS], w), {"w": (POSITIONS, 5)},
                      no_rule("w", call="einsum")),
    "einsum, three": (lambda x, w: torch.einsum("bti,io,t->bto", x, w, torch.ones(x.shape[1]).double()), TURNED,
                      no_rule("w", call="einsum")),
    "add by keyword": (lambda x, w: torch.add(x, other=w), {"w": (WIDTH,)}, no_rule("w", call="add")),
    "add by keywords": (lambda x, w: torch.add(input=w, other=x), {"w": (WIDTH,)}, no_rule("w", call="add")),
    "Tensor.add by keyword": (lambda x, w: x.add(other=w), {"w": (WIDTH,)}, no_rule("w", call="add")),
    "mul by keyword": (lambda x, w: torch.mul(x, other=w), {"w": (WIDTH,)}, no_rule("w", call="mul")),
    "mul by keywords": (lambda x, w: torch.mul(input=x, other=w), {"w": (WIDTH,)}, no_rule("w", call="mul")),
    "expand by keyword": (lambda x, w: x + w.expand(size=(len(x), 1, WIDTH)), {"w": (1, 1, WIDTH)},
                          no_rule("w", call="expand")),
}  # fmt: skip


@pytest.mark.parametrize("form", UNRULED)
def test_calls_without_a_rule_go_to_single_examples(form):
    function, shapes, notes = UNRULED[form]
    assert_notes(function, shapes, batch_of(POSITIONS, WIDTH), notes)


FLAT_UNRULED = {
    "mm by keyword": (lambda x, w: torch.mm(x, mat2=w), TURNED, no_rule("w", call="mm")),
    "addmm by keyword": (lambda x, b, w: torch.addmm(b, x, mat2=w), B | TURNED, no_rule("b", "w", call="addmm")),
    "addmm by keywords": (
        lambda x, b, w: torch.addmm(input=b, mat1=x, mat2=w), B | TURNED, no_rule("b", "w", call="addmm"),
    ),
    "addmm, beta": (lambda x, b, w: torch.addmm(b, x, w, beta=2), B | TURNED, no_rule("b", "w", call="addmm")),
    "addmm, alpha": (lambda x, b, w: torch.addmm(b, x, w, alpha=2), B | TURNED, no_rule("b", "w", call="addmm")),
    "addmm, a matrix": (
        lambda x, b, w: torch.addmm(b, x, w), {"b": (1, 5)} | TURNED, no_rule("b", "w", call="addmm"),
    ),
    "addmm, no weight": (
        lambda x, b: torch.addmm(b, x, torch.ones(WIDTH, 5).double()), B, no_rule("b", call="addmm"),
    ),
    "addmm, no bias": (
        lambda x, w: torch.addmm(torch.ones(5).double(), x, w), TURNED, no_rule("w", call="addmm"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FLAT_UNRULED)
def test_calls_of_rows_without_a_rule_go_to_single_examples(form):
    assert_notes(*FLAT_UNRULED[form][:2], batch_of(WIDTH), FLAT_UNRULED[form][2])


@pytest.mark.parametrize("options", [dict(groups=2), dict(padding="same"), dict(padding="valid")], ids=str)
def test_convolutions_without_a_rule(options):
    shape = (4, 2 // options.get("groups", 1), 3, 3)
    assert_notes(lambda x, w: F.conv2d(x, w, **options), {"w": shape}, batch_of(2, 6, 7), no_rule("w", call="conv2d"))


def test_embeddings_without_a_rule():
    batch = {"x": torch.tensor([[0, 1, 1], [2, 2, 2]]), "labels": torch.zeros(2)}
    assert_notes(lambda x, w: F.embedding(x, w, scale_grad_by_freq=True), {"w": (5, 3)}, batch,
                 no_rule("w", call="embedding"))  # fmt: skip


def test_a_use_that_is_not_seen():
    def hidden(x, w):
        with torch._C.DisableTorchFunction():
            return x * w

    notes = {"w": "one example at a time: used where its calls are not seen"}
    assert_notes(hidden, {"w": (WIDTH,)}, batch_of(POSITIONS, WIDTH), notes)


def test_a_use_inside_an_autograd_function():
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, grad):
            x, w = ctx.saved_tensors
            return grad * w, (grad * x).sum((0, 1))

    notes = {"w": "one example at a time: used inside an autograd function, which may differentiate it itself"}
    assert_notes(Hidden.apply, {"w": (WIDTH,)}, batch_of(POSITIONS, WIDTH), notes)


# ---- few bits, few examples ----------------------------------------------------------------------------------------


def uses(dtype: torch.dtype) -> dict[str, rules.Use]:
    """One use of each kind, of 3 examples, whose sums lose digits in 16 bit."""

    def draw(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)

    three, wide = (3, 0), torch.Size((WIDTH,))
    d, x = draw(3, 50, 5), draw(3, 50, WIDTH)
    made = {
        "product": rules.Product(torch.Size((5, WIDTH)), *three, grad=d, x=x),
        "transposed": rules.Product(torch.Size((WIDTH, 5)), *three, grad=d, x=x, transposed=True),
        "convolution": rules.Convolution(torch.Size((4, 2, 3, 3)), *three, grad=draw(3, 4, 5, 5), x=draw(3, 2, 7, 7)),
        "einsum": rules.Einsum(torch.Size((WIDTH, 5)), *three, grad=d, x=x, equation="Abti,Abto->Aio"),
        "shift": rules.Elementwise(wide, *three, grad=x),
        "column": rules.Elementwise(torch.Size((50, 1)), *three, grad=x),
        "bias": rules.Bias(torch.Size((5,)), *three, grad=d),
        "scale": rules.Scale(wide, *three, grad=x, other=draw(3, 50, 1)),
        "norm": rules.Norm(wide, *three, grad=x, x=x + 1, normalise=lambda x: x / x.norm(dim=-1, keepdim=True)),
        "embedding": rules.Lookup(torch.Size((4, WIDTH)), *three, grad=x, ids=torch.arange(150).view(3, 50) % 4),
    }
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", uses(torch.float32))
def test_single_gradients_are_summed_in_float32(kind, dtype):
    """The rule's short way, the gradients of examples and those of two uses agree with float64 of the same bits."""
    use, exact = uses(dtype)[kind], uses(dtype)[kind]
    for key in ("grad", "x", "other"):
        if isinstance(getattr(exact, key, None), Tensor):
            setattr(exact, key, getattr(exact, key).double())
    gradients, expected = use.per_example(0, 3), exact.per_example(0, 3)
    assert gradients.dtype == torch.float32 and expected.dtype == torch.float64
    size = float(expected.norm())
    assert float((gradients - expected).norm()) < 1e-6 * size
    assert torch.equal(torch.cat([use.per_example(0, 1), use.per_example(1, 3)]).sum(0), gradients.sum(0))
    short, same, long = torch.zeros(use.shape), torch.zeros(use.shape), torch.ones(use.shape)
    use.accumulate_(short)
    rules.accumulate_uses_(same, [use])
    rules.accumulate_uses_(long, [use, use])
    squares = expected.square().sum(0)
    bound = 1e-5 * float(squares.norm())
    assert float((short - squares).norm()) < bound and float((same - squares).norm()) < bound
    assert float((long - 1 - 4 * squares).norm()) < 4 * bound + 1e-5


@pytest.mark.parametrize("size", [1, 2, 3, 40])
@pytest.mark.parametrize("examples", [1, 2, 3, 5])
def test_gradients_of_a_few_examples_at_a_time(size, examples, monkeypatch):
    """As many as fit into the limit, at least one; every example once."""
    asked = []

    class Recorded(rules.Elementwise):
        def per_example(self, lo, hi):
            asked.append((lo, hi))
            return super().per_example(lo, hi)

    grad = torch.randn(5, 7, size)
    total = torch.zeros(size)
    monkeypatch.setattr(rules, "_CHUNK_BYTES", 4 * size * examples)
    rules.accumulate_uses_(total, [Recorded(total.shape, 5, 0, grad=grad)])
    assert [i for lo, hi in asked for i in range(lo, hi)] == list(range(5))
    assert max(hi - lo for lo, hi in asked) == examples and len(asked) == -(-5 // examples)
    torch.testing.assert_close(total, grad.sum(1).square().sum(0))


# ---- from batch to batch --------------------------------------------------------------------------------------------


class Switched(nn.Module):
    """Leaves its first layer out of the losses of batches that say so."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x, off: bool):
        y = self.inner(x)
        return self.last(y.detach() if off else y)


@pytest.mark.parametrize("off", [[False, True], [True, False], [False, True, False]], ids=str)
def test_a_parameter_without_gradient_in_some_batches_keeps_its_rule(off):
    def loss(model, batch):
        return model(batch["x"], batch["off"]).square().sum(1)

    model = Switched()
    batches = [batch_of(4) | {"off": value} for value in off]
    fisher = estimate_fisher(model, batches, loss)
    assert fisher.notes == {f"{layer}.{part}": rule for layer in ("inner", "last")
                            for part, rule in (("weight", "product"), ("bias", "bias"))}  # fmt: skip
    assert_same(fisher, one_by_one(model, batches, loss))


def test_a_part_without_gradient_has_no_information():
    class Frozen(Switched):
        def forward(self, x, off):
            with torch.no_grad():
                y = self.inner(x)
            return self.last(y)

    def loss(model, batch):
        return model(batch["x"], False).square().sum(1)

    model = Frozen()
    fisher = estimate_fisher(model, [batch_of(4), batch_of(4)], loss)
    assert [fisher.notes[f"inner.{part}"] for part in ("weight", "bias")] == ["no gradient"] * 2
    assert_same(fisher, one_by_one(model, [batch_of(4)] * 2, loss))


@pytest.mark.parametrize("times", [[1, 2], [2, 1]], ids=str)
def test_a_use_that_the_first_batch_does_not_have(times):
    """More uses than the first batch has no one knows the shapes of; fewer are all right."""

    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(4, 4).double(), nn.Linear(4, 2).double()

        def forward(self, x, times):
            for _ in range(times):
                x = self.inner(x).tanh()
            return self.last(x)

    def loss(model, batch):
        return model(batch["x"], batch["times"]).square().sum(1)

    model, batches = Repeated(), [batch_of(4) | {"times": count} for count in times]
    fisher = estimate_fisher(model, batches, loss)
    left = "one example at a time: used by this batch in another way than by the first"
    inner = [left, left] if times == [1, 2] else ["product", "bias"]
    assert [fisher.notes[f"inner.{part}"] for part in ("weight", "bias")] == inner
    assert fisher.notes["last.weight"] == "product" and fisher.notes["last.bias"] == "bias"
    assert_same(fisher, one_by_one(model, batches, loss))


def test_a_bias_that_a_batch_uses_once_more_than_the_first():
    """A call of which only one parameter is known this way leaves both to single examples."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4).double()

        def forward(self, x, more):
            return self.layer(x + self.layer.bias if more else x)

    def loss(model, batch):
        return model(batch["x"], batch["more"]).square().sum(1)

    model, batches = Shared(), [batch_of(4) | {"more": more} for more in (False, True)]
    fisher = estimate_fisher(model, batches, loss)
    left = "one example at a time: used by this batch in another way than by the first"
    assert fisher.notes == {"layer.weight": left, "layer.bias": left}
    assert_same(fisher, one_by_one(model, batches, loss))


@pytest.mark.parametrize(
    "looks, right",
    [
        ([([0, 1, 2], True), ([0, 1, 2], True)], True),
        ([([2, 0, 1], True)], True),
        ([([-1, 0, 1], True), ([2, 0, -1], True)], True),  # rows of zeros may be anyone's
        ([([-1, -1, -1], True)], True),
        ([([0, 1, 2], False), ([0, 1, 2], True)], False),
        ([([0, 1, 2], True), ([0, 1, 2], False)], False),
        ([([0, 1, 2], True), ([1, 0, 2], True)], False),
        ([([0, 1, 2], True), ([1, 0, 2], True), ([1, 0, 2], True)], False),
        ([([0, 0, 2], True)], False),
        ([([0, -1, 2], True), ([-1, 0, 2], True)], False),  # one example's rows in two places
        ([([1, -1, -1], True), ([2, 0, -1], True)], False),  # one place, two examples' rows
    ],
)
def test_verdicts_are_of_all_uses(looks, right):
    """Each use's rows must be one example's each, of no example twice, and in one order for all uses."""
    tape = Tape({}, ["w"], 3, {})
    for owner, ok in looks:
        found = torch.tensor(owner), torch.tensor(ok)
        tape.code = SimpleNamespace(read=lambda plain, sketches, dtype, found=found: found)
        tape.judge(Output({"w": rules.Elementwise(torch.Size((2,)), 3, 0)}), ["w"], torch.ones(3, 2))
    assert bool(tape.verdicts["w"]) is right


def test_shapes_that_follow_no_pattern_are_told_apart():
    one, two = (Tape({}, ["a", "b", "c"], size, {}) for size in (1, 2))
    row, rows, unruled = torch.Size((1, 4)), torch.Size((2, 4)), {}
    one.shapes = {("a", 0): (row, row), ("b", 0): (row, row), ("b", 1): (row, row), ("c", 0): (rows, rows)}
    two.shapes = {("a", 0): (rows, rows), ("b", 0): (rows, rows), ("c", 0): (rows, rows)}
    assert find_layout(one, two, unruled) == {("a", 0): (0, 0), ("b", 0): (0, 0)}
    assert unruled == {"b": "used a different number of times by one and by two examples",
                       "c": "an output without an example dimension"}  # fmt: skip


@pytest.mark.parametrize("factor, found", [(1.005, False), (1.2, True), (0.8, True)])
def test_a_rule_that_is_wrong_by_a_fifth_is_found(factor, found, monkeypatch):
    """Rounding in few bits is not taken for that: a wrong rule is wrong by more than a hundredth."""
    own = rules.Product.accumulate_

    def wrong(self, total):
        part = torch.zeros_like(total)
        own(self, part)
        total += part * factor

    monkeypatch.setattr(rules.Product, "accumulate_", wrong)
    notes = estimate_fisher(nn.Linear(4, 2).double(), [batch_of(4)], loss).notes
    left = "one example at a time: the batched rule disagreed with single examples"
    assert notes == {"weight": left if found else "product", "bias": "bias"}


class Positions(nn.Module):
    """One row of position ids for all examples, whose embedding is repeated by broadcasting or by the model itself."""

    def __init__(self, repeated: bool):
        super().__init__()
        self.table, self.last = nn.Embedding(POSITIONS, WIDTH).double(), nn.Linear(WIDTH, 3).double()
        self.repeated = repeated

    def forward(self, x):
        rows = self.table(torch.arange(x.shape[1])[None])
        return self.last((x + (rows.repeat(len(x), 1, 1) if self.repeated else rows)).tanh()).mean(1)


@pytest.mark.parametrize("labels", ["true", "sampled", "predicted"])
@pytest.mark.parametrize("repeated", [False, True])
def test_inputs_shared_by_the_batch_whatever_the_labels(repeated, labels):
    """What decides about rules goes by the true labels: drawn anew, losses would differ from one look to the next."""

    def loss(model, batch, labels="true"):
        logits = model(batch["x"])
        drawn = torch.randint(0, 3, (len(logits),)) if labels == "sampled" else logits.argmin(1)
        return F.cross_entropy(logits, batch["labels"].long() if labels == "true" else drawn, reduction="none")

    for check in (False, True):
        model = Positions(repeated)
        fisher = estimate_fisher(model, [batch_of(POSITIONS, WIDTH)], loss, labels=labels, check=check)
        alone = "one example at a time: an input shared by the batch, which the model repeats itself"
        table = alone if repeated else "embedding"
        assert fisher.notes == {"table.weight": table, "last.weight": "product", "last.bias": "bias"}


# ---- sums, and what a captured pass does in an ordinary one's place -------------------------------------------------


def test_squares_of_gradients_however_they_lie():
    grads = [torch.randn(4, 3).t(), None, torch.randn(6)[::2], torch.randn(1).expand(5), torch.randn(2, 2).double().t()]
    sums = [torch.ones(3, 4), torch.ones(2), torch.ones(3), torch.ones(5), torch.ones(2, 2).double()]
    square_into(sums, grads, 0.5)
    for total, grad in zip(sums, grads, strict=True):
        expected = torch.ones_like(total) if grad is None else 1 + 0.5 * grad.square()
        torch.testing.assert_close(total, expected)


def test_a_replay_takes_the_batch_in_and_counts_and_judges_it():
    """Without a GPU: the graph's place is taken by something that counts."""
    model = nn.Linear(4, 2).double()
    exact = Exact(dict(model.named_parameters()), Losses(model, loss, "true"))
    captured, replayed = object.__new__(Captured), []
    captured.exact, captured.usable, captured.examples = exact, True, EXAMPLES
    captured.batch, captured.finite = batch_of(4), torch.tensor(True)
    captured.batch["x"].zero_()
    captured.graph = SimpleNamespace(replay=lambda: replayed.append(captured.batch["x"].clone()))
    exact.captured = captured
    assert exact.add(batch_of(4), exact.sums) == EXAMPLES
    assert len(replayed) == 1 and replayed[0].equal(batch_of(4)["x"])
    captured.finite.fill_(False)  # by a later replay
    assert exact.losses.finite == [torch.tensor(True)]
    other = batch_of(5, 4)
    assert not any(total.any() for total in exact.sums.values()) and exact.add(other, exact.sums) == EXAMPLES
    assert len(replayed) == 1
    for name, expected in one_by_one(model, [other], loss).items():
        torch.testing.assert_close(exact.sums[name], expected)


def test_an_error_of_the_loss_is_its_own_and_comes_once():
    calls = []

    def loss(model, batch):
        calls.append(len(batch["x"]))
        if batch["x"].isnan().any():
            raise KeyError("a bad batch")
        return model(batch["x"]).square().sum(1)

    bad = {"x": torch.full((5, 4), torch.nan).double(), "labels": torch.zeros(5)}
    with pytest.raises(KeyError, match="a bad batch"):
        estimate_fisher(nn.Linear(4, 2).double(), [batch_of(4), bad], loss)
    assert calls.count(5) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wide", [False, True], ids=["its-own-loss", "float32-loss"])
def test_rows_are_told_apart_within_the_range_of_the_dtype(wide, dtype):
    """Float16 has few exponents: the weights that tell examples apart stay within them, whatever the losses' dtype."""

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3).to(dtype)

        def forward(self, x):
            order = torch.arange(len(x)).flip(0)
            return self.layer(x[order])[order]

    def loss(model, batch):
        y = model(batch["x"])
        return (y.to(torch.promote_types(dtype, torch.float32)) if wide else y).square().sum(1) * 0.01

    batch = {"x": torch.randn(24, 4).to(dtype), "labels": torch.zeros(24)}
    fisher = estimate_fisher(Routed(), [batch], loss)
    assert fisher.notes == {"layer.weight": "product", "layer.bias": "bias"} and not alone(fisher)
