"""Whose rows are whose: models that mix, move and share examples' rows, in ways that change from batch to batch."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Parameter

from childtune_kernels.fisher import estimate_fisher, owners
from childtune_kernels.fisher.batches import take

EXACT = 1e-9  # float64: sums of a few thousand terms, some ten operations deep
FLOOR = 1e-11  # of the largest tensor: gradients that are 0 but for rounding


def draw(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def squared_error(model, batch) -> torch.Tensor:
    return (model(*batch[:-1]) - batch[-1]).square().flatten(1).sum(1)


def _size(batch) -> int:
    return len(batch["labels"] if isinstance(batch, dict) else batch[-1])


def one_by_one(model, batches, loss) -> dict[str, torch.Tensor]:
    """The definition: autograd on batches of one example."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    count = 0
    for batch in batches:
        count += _size(batch)
        for j in range(_size(batch)):
            one = take(batch, [j], _size(batch))
            grads = torch.autograd.grad(loss(model, one).sum(), list(named.values()), allow_unused=True)
            for total, grad in zip(sums.values(), grads, strict=True):
                total += 0 if grad is None else (grad.to_dense() if grad.is_sparse else grad) ** 2
    return {name: total / count for name, total in sums.items()}


def assert_right(model, batches, loss=squared_error, **options):
    """Return the estimate, which must be that of single examples; half of them must have information at all."""
    fisher = estimate_fisher(model, batches, loss, **options)
    expected = one_by_one(model, batches, loss)
    largest = max(float(value.norm()) for value in expected.values())
    assert largest > 0
    for name, value in expected.items():
        error = float((fisher[name] - value).norm())
        assert error <= EXACT * float(value.norm()) + FLOOR * largest, (name, fisher.notes[name], error)
    return fisher


class OneLinear(nn.Module):
    def __init__(self, more: int = 0):
        super().__init__()
        self.linear = nn.Linear(6, 3).double()
        self.inner = nn.Linear(6, 6).double()
        self.position = nn.Embedding(5, 6).double()


class Crops(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).double()

    def forward(self, x):
        return self.conv(x.flatten(0, 1)).tanh().mean((2, 3)).view(*x.shape[:2], 4).sum(1)


class Unpadded(OneLinear):
    """Tokens of a batch in one row after another, without padding; how many are whose changes at equal totals."""

    def forward(self, x, keep):
        keep = keep.bool()
        own = torch.arange(len(x))[:, None].expand(keep.shape)[keep]
        return x.new_zeros(len(x), 3).index_add(0, own, self.linear(x[keep]).tanh())


class TimeMajor(OneLinear):
    def forward(self, x):
        b, t, _ = x.shape
        return self.linear(x.transpose(0, 1).reshape(t * b, 6)).tanh().view(t, b, 3).sum(0)


class Turning(OneLinear):
    """Batch first in one batch, sequence first in the next."""

    def forward(self, x):
        if x.shape[1] == 4:
            return self.linear(x.transpose(0, 1)).tanh().transpose(0, 1).sum(1)
        return self.linear(x).tanh().sum(1)


class Chunks(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = Parameter(draw(6, 2, 3))

    def forward(self, x):
        parts = torch.einsum("btd,dhk->bhk", x.flatten(0, 1), self.weight)
        return parts.reshape(*x.shape[:2], 6).tanh().sum(1)


class Sorted(OneLinear):
    """Longest first and back again, as code for packed sequences does: the order depends on the data."""

    def forward(self, x, length):
        order = length.argsort(descending=True)
        return self.linear(self.inner(x[order]).tanh()).tanh().sum(1)[order.argsort()]


class SortedTwice(OneLinear):
    """A weight used in both orders: the uses of one example are in different places."""

    def forward(self, x, length):
        order = length.argsort(descending=True)
        y = self.inner(self.inner(x).tanh()[order]).tanh()
        return self.linear(y).tanh().sum(1)[order.argsort()]


class Interleaved(OneLinear):
    """Rows of two examples by turns, from the second batch on."""

    def forward(self, x, length):
        order = length.argsort()
        rows = self.inner(x).flatten(0, 1).view(x.shape).transpose(0, 1)[:, order].flatten(0, 1)
        return self.linear(rows).tanh().view(x.shape[1], len(x), 3).sum(0)[order.argsort()]


class Stacked(OneLinear):
    """The same in Python: no index tensor anywhere."""

    def forward(self, x, length):
        order = length.argsort().tolist()
        rows = self.inner(x).unbind(0)
        y = self.linear(torch.stack([rows[i].tanh() for i in order])).tanh().sum(1).unbind(0)
        return torch.stack([y[order.index(i)] for i in range(len(x))])


class Routed(OneLinear):
    """By a product with a permutation matrix, whose zeros route."""

    def forward(self, x, length):
        route = F.one_hot(length.argsort(), len(x)).to(x)
        return route.T @ self.linear((route @ self.inner(x).flatten(1)).view_as(x)).tanh().sum(1)


class Chosen(OneLinear):
    """Reversed where the data says so, element by element."""

    def forward(self, x, length):
        turn = (length[0] > length[-1]).expand(len(x), 1, 1)
        y = self.inner(x)
        y = self.linear(torch.where(turn, y.flip(0), y)).tanh().sum(1)
        return torch.where(turn[:, 0], y.flip(0), y)


class Packed(OneLinear):
    """Attention over all tokens of a batch in one row, held apart by a mask whose borders move."""

    def forward(self, x, length):
        own = torch.repeat_interleave(torch.arange(len(x)), length.long())
        y = self.inner(torch.cat([row[: int(n)] for row, n in zip(x, length, strict=True)])[None])
        mask = (own[:, None] == own)[None, None]
        y = F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None], attn_mask=mask)[0, 0]
        return x.new_zeros(len(x), 3).index_add(0, own, self.linear(y))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 6).double()
        self.gate = nn.Linear(6, 3, bias=False).double()
        self.head = nn.Linear(6, 3).double()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6)) for _ in range(3))
        self.experts.double()

    def forward(self, ids):
        b, t = ids.shape
        x = self.embed(ids).view(b * t, 6)
        weight, chosen = self.gate(x).softmax(-1).topk(1, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            if len(token):
                out = out.index_add(0, token, expert(x[token]) * weight[token, slot, None])
        return self.head(out.view(b, t, 6).mean(1))


class Choices(OneLinear):
    """[1, T] position ids for n choices or images an example."""

    def forward(self, x):
        b, n, t, _ = x.shape
        positions = self.position(torch.arange(t)[None])
        return self.linear(x.flatten(0, 1) + positions).tanh().sum(1).view(b, n, 3).sum(1)


class Broadcast(OneLinear):
    """The same against [B, n, T, d], where B copies pass for n."""

    def forward(self, x):
        return self.linear(x + self.position(torch.arange(x.shape[2])[None])).tanh().sum((1, 2))


class Repeated(OneLinear):
    """A [1, n, d] table through a Linear that the model repeats itself, as DeBERTa-v2."""

    def forward(self, x):
        table = self.inner(x.new_ones(1, 5, 6))
        return self.linear(x + table.repeat(len(x), 1, 1)).tanh().sum(1)


class Summed(OneLinear):
    """One whose copies would be summed: more copies are another function, of the same shapes."""

    def forward(self, x):
        return self.linear(x + self.position(torch.arange(5)[None]).sum(0)).tanh().sum(1)


class Times(OneLinear):
    """Another number of uses in each batch, and for each example."""

    def forward(self, x, length):
        for _ in range(int(length.max())):
            mine = (length > 0)[:, None, None]
            x, length = torch.where(mine, self.inner(x).tanh(), x), length - 1
        return self.linear(x).sum(1)


def lengths(*given) -> tuple[torch.Tensor, ...]:
    keep = torch.stack([(torch.arange(8) < n).double() for n in given])
    return draw(len(given), 8, 6), keep, draw(len(given), 3)


def ordered(*given) -> tuple[torch.Tensor, ...]:
    return draw(len(given), 5, 6), torch.tensor(given), draw(len(given), 3)


FALLING, MIXED = (4, 3, 2, 1), (2, 4, 1, 3)  # sorted already, and not: the shapes are the same
CASES = {
    "crops": (Crops, lambda: [(draw(4, n, 3, 6, 6), draw(4, 4)) for n in (1, 4, 2)]),
    "unpadded": (Unpadded, lambda: [lengths(4, 4, 2, 6), lengths(1, 7, 2, 2), lengths(4, 4, 4, 4)]),
    "unpadded-even": (Unpadded, lambda: [lengths(4, 4, 4, 4), lengths(1, 7, 2, 6), lengths(3, 3)]),
    "unpadded-single": (Unpadded, lambda: [lengths(5), lengths(1, 7, 2, 2)]),
    "time-major": (TimeMajor, lambda: [(draw(4, t, 6), draw(4, 3)) for t in (1, 4, 3)]),
    "turning": (Turning, lambda: [(draw(b, t, 6), draw(b, 3)) for b, t in ((2, 8), (2, 4), (4, 4))]),
    "chunks": (Chunks, lambda: [(draw(4, n, 5, 6), draw(4, 6)) for n in (1, 4)]),
    "sorted": (Sorted, lambda: [ordered(*FALLING), ordered(*MIXED), ordered(7), ordered(1, 2, 3)]),
    "sorted-twice": (SortedTwice, lambda: [ordered(*FALLING), ordered(*MIXED), ordered(*FALLING)]),
    "interleaved": (Interleaved, lambda: [(draw(4, t, 6), torch.tensor(MIXED), draw(4, 3)) for t in (1, 5, 4)]),
    "stacked": (Stacked, lambda: [ordered(*sorted(FALLING)), ordered(*MIXED)]),
    "routed": (Routed, lambda: [ordered(*sorted(FALLING)), ordered(*MIXED)]),
    "chosen": (Chosen, lambda: [ordered(1, 2, 3, 4), ordered(4, 3, 1, 2)]),
    "packed": (Packed, lambda: [ordered(2, 2, 2, 2), ordered(3, 1, 2, 2), ordered(1, 1, 5, 1)]),
    "experts": (Experts, lambda: [(torch.randint(0, 20, (b, t)), draw(b, 3)) for b, t in ((2, 2), (4, 3), (3, 1))]),
    "choices": (Choices, lambda: [(draw(4, n, 5, 6), draw(4, 3)) for n in (1, 3, 4)]),
    "broadcast": (Broadcast, lambda: [(draw(b, n, 5, 6), draw(b, 3)) for b, n in ((2, 1), (4, 4), (4, 3), (2, 2))]),
    "repeated": (Repeated, lambda: [(draw(b, 5, 6), draw(b, 3)) for b in (4, 3, 1)]),
    "summed": (Summed, lambda: [(draw(4, 5, 6), draw(4, 3))]),
    "times": (Times, lambda: [ordered(1, 1), ordered(3, 2, 1), ordered(0, 1, 2), ordered(1, 1)]),
}


@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_their_examples(case, seed, check):
    torch.manual_seed(seed)
    make, batches = CASES[case]
    assert_right(make(), batches(), check=check)


@pytest.mark.parametrize("case", ["sorted-twice", "unpadded-even", "interleaved", "packed"])
def test_what_was_added_before_stays_right(case):
    """A parameter left to single examples in a later batch keeps what the batches before gave it."""
    make, batches = CASES[case]
    fisher = assert_right(make(), batches())
    assert "rows that are not one example's each" in fisher.report()


def proofs(monkeypatch) -> list[bool]:
    """Return the list to which each pass adds whether the graph proved the order of its rows."""
    found = []

    def inspect(losses, examples):
        graph = owners_inspect(losses, examples)
        found.append(graph.in_order)
        return graph

    owners_inspect = owners.inspect
    monkeypatch.setattr(owners, "inspect", inspect)
    return found


MOVING = ["unpadded", "time-major", "sorted", "stacked", "routed", "chosen", "packed"]


@pytest.mark.parametrize("case", MOVING)
def test_what_moves_rows_by_data_proves_nothing(case, monkeypatch):
    found = proofs(monkeypatch)
    make, batches = CASES[case]
    estimate_fisher(make(), batches(), squared_error, check=False)
    assert not all(found)


@pytest.mark.parametrize("name", [name for name in models.NAMES if not name.startswith("xlnet")])
def test_ordinary_models_need_no_second_pass(name, monkeypatch):
    """XLNet goes sequence first, which proves nothing."""
    found = proofs(monkeypatch)
    estimate_fisher(models.build(name), [models.batch(name, 3, 5)], models.loss_of(name))
    assert found == [True, True]  # two examples, then the batch


def test_examples_that_only_change_places_stay_together():
    """Whole examples in another order, as code for packed sequences sorts them, need no single examples."""
    for case in ("sorted", "stacked", "routed", "chosen"):
        make, batches = CASES[case]
        assert "one example at a time" not in assert_right(make(), batches()).report()


def test_more_examples_than_codes():
    """Digits: every pair of examples differs in one of the passes."""
    for half in (False, True):
        weights = torch.stack(owners.Code(70, half).weights(torch.zeros(70)))
        assert len(set(map(tuple, weights.T.tolist()))) == 70
        assert bool((weights.log2() == weights.log2().round()).all())
    x, length, y = ordered(*range(40, 0, -1))
    shuffled = torch.randperm(40)
    fisher = assert_right(Sorted(), [(x, length, y), (x, length[shuffled], y)])
    assert "one example at a time" not in fisher.report()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_of_several_examples_is_found(dtype):
    """In the last bits of one element of one row, too; rows whose powers underflow are left, not believed."""
    d = torch.randn(6, 4, dtype=dtype)
    code = owners.Code(3, dtype == torch.float16)
    (weights,) = code.weights(torch.zeros(3, dtype=dtype))
    weights = weights.repeat_interleave(2)[:, None]

    def read(plain, scaled):
        owner, right = code.read(owners.sketch(plain, 0), [owners.sketch(scaled, 0)], dtype)
        return owner.tolist(), bool(right)

    assert read(d, d * weights) == ([0, 1, 2], True)
    assert read(d, (d * weights.roll(2, 0))) == ([2, 0, 1], True)
    assert read(torch.zeros_like(d), torch.zeros_like(d)) == ([-1, -1, -1], True)
    assert not read(d, d * weights.roll(1, 0))[1] and not read(d, torch.full_like(d, torch.nan))[1]
    nearly = d * weights
    nearly[3, 1] *= 1 + 2 * torch.finfo(dtype).eps
    assert not read(d, nearly)[1]
    if dtype == torch.float16:
        tiny = torch.tensor([[3e-7], [0.0], [0.0], [0.0], [0.0], [0.0]], dtype=dtype)
        assert not read(tiny, tiny * weights)[1]


def test_numbers_of_examples_are_whole():
    """Whatever torch's default dtype is: in bfloat16, 257 would be 256."""
    default, grad = torch.get_default_dtype(), torch.randn(300, 4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        code = owners.Code(300, half=False)
        coded = [owners.sketch(grad * weights[:, None], 0) for weights in code.weights(grad[:, 0])]
        owner, right = code.read(owners.sketch(grad, 0), coded, grad.dtype)
    finally:
        torch.set_default_dtype(default)
    assert owner.tolist() == list(range(300)) and bool(right)


@pytest.mark.parametrize("shape, dim, runs", [((6,), 0, 1), ((3, 6, 50), 1, 1), ((4, 3, 1 << 16), 0, 3)], ids=str)
def test_a_sketch_is_small_and_of_each_row_alone(shape, dim, runs):
    grad = draw(*shape)
    sketch, order = owners.sketch(grad, dim), torch.randperm(shape[dim])
    assert sketch.shape == (shape[dim], runs, 8)
    torch.testing.assert_close(owners.sketch(3 * grad.index_select(dim, order), dim), 3 * sketch[order])


PROVEN = {
    "products of several matrices": (lambda x: (x.view(2, 2, 6) @ draw(2, 6, 3)).view(4, 3).sum(1), True),
    "broadcast within examples": (lambda x: (x[:, None] * draw(4, 3, 6)).sum((1, 2)), True),
    "broadcast over examples": (lambda x: (x[None] * draw(4, 4, 6)).sum((1, 2)), False),
    "stored statistics": (lambda x: F.batch_norm(x, draw(6), draw(6).exp()).sum(1), True),
    "the batch's statistics": (lambda x: F.batch_norm(x, None, None, training=True).sum(1), False),
}


@pytest.mark.parametrize("losses, in_order", PROVEN.values(), ids=PROVEN)
def test_what_the_graph_of_four_examples_proves(losses, in_order):
    x = draw(4, 6).requires_grad_() * 2
    assert owners.inspect(losses(x), 4).in_order == in_order


def test_owners_of_several_uses_agree():
    a, b = torch.tensor([0, 2, -1]), torch.tensor([0, -1, 1])
    own, same = owners.merged(a, b)
    assert own.tolist() == [0, 2, 1] and bool(same) and bool(owners.distinct(own))
    assert not bool(owners.merged(a, torch.tensor([2, 0, 1]))[1])
    assert not bool(owners.distinct(torch.tensor([1, 0, 1]))) and bool(owners.distinct(torch.tensor([-1, -1, 0])))


class Penalised(OneLinear):
    """A loss that differentiates inside: its gradient depends on the weights a second time."""

    def forward(self, x):
        x = x.detach().requires_grad_()
        y = self.linear(self.inner(x).tanh()).sum((1, 2))
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.stack([y, slope.square().sum((1, 2))], 1)


class Adversarial(OneLinear):
    """One whose inner gradient is a constant, of hidden states that are no leaf."""

    def forward(self, x):
        hidden = self.inner(x)
        (slope,) = torch.autograd.grad(self.linear(hidden).square().sum(), hidden, retain_graph=True)
        return self.linear(hidden + 0.1 * slope.sign()).tanh().sum(1)


@pytest.mark.parametrize("make, width", [(Penalised, 2), (Adversarial, 3)])
@pytest.mark.parametrize("check", [True, False])
def test_losses_that_differentiate_inside(make, width, check):
    assert_right(make(), [(draw(b, t, 6), draw(b, width)) for b, t in ((3, 4), (2, 5))], check=check)


class Leaf(OneLinear):
    def forward(self, x):
        return self.linear(self.inner(x.requires_grad_())).tanh().sum(1)


class Frozen(OneLinear):
    """What PEFT's enable_input_require_grads makes: a frozen embedding whose output is a leaf of its own."""

    def __init__(self):
        super().__init__()
        self.position.weight.requires_grad_(False)
        self.position.register_forward_hook(lambda module, args, output: output.requires_grad_())

    def forward(self, ids):
        return self.linear(self.inner(self.position(ids))).tanh().sum(1)


def test_inputs_that_require_gradients():
    batches = [(draw(b, 5, 6), draw(b, 3)) for b in (4, 2)]
    assert_right(Leaf(), batches)
    for x, _ in batches:
        assert x.grad is None
    model, batch = Frozen(), (torch.randint(0, 5, (4, 7)), draw(4, 3))
    fisher = estimate_fisher(model, [batch], squared_error)
    model.position.weight.requires_grad_(True)
    expected = one_by_one(model, [batch], squared_error)
    for name in fisher:
        torch.testing.assert_close(fisher[name], expected[name], rtol=EXACT, atol=0)


class Double(torch.autograd.Function):
    """A function of the user's own, with a weight that no rule sees; its name is that of one of torch's."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return (x @ weight.t()).flip(0)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad.flip(0) @ weight, grad.flip(0).t() @ x


Double.__name__ = "Mul"


class Hidden(OneLinear):
    def forward(self, x):
        return Double.apply(Double.apply(self.linear(x).tanh(), self.inner.weight[:3, :3]), torch.eye(3).to(x))


class Direct(OneLinear):
    def forward(self, x):
        return Double.apply(self.linear(Double.apply(self.inner(x).tanh(), self.inner.weight)), torch.eye(3).to(x))


@pytest.mark.parametrize("make", [Hidden, Direct])
def test_parameters_of_functions_of_the_users_own(make):
    assert_right(make(), [(draw(b, 6), draw(b, 3)) for b in (4, 3)])


class Padding(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = Parameter(draw(10, 6))

    def forward(self, ids):
        return F.embedding(ids, self.weight, padding_idx=-1).tanh().sum(1)


def test_padding_idx_counts_from_the_end():
    assert_right(Padding(), [(torch.randint(0, 9, (4, 5)), draw(4, 6)), (torch.full((4, 5), 9), draw(4, 6))])
    assert_right(Padding(), [(torch.randint(7, 10, (4, 5)), draw(4, 6))], check=False)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1).double().eval()

    def forward(self, x, pad):
        return self.encoder(x, src_key_padding_mask=pad.bool()).sum(1)


def test_transformer_encoder_with_a_padding_mask():
    pad = (torch.arange(5) > torch.tensor([[4], [3], [1], [2]])).double()
    assert_right(Encoder().eval(), [(draw(4, 5, 6), pad, draw(4, 6)), (draw(2, 3, 6), pad[:2, 1:4], draw(2, 6))])


class Table(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Embedding(10, 6, **options).double()
        self.last = nn.Linear(6, 3).double()

    def forward(self, ids):
        return self.last(self.embed(ids)).tanh().sum(1)


@pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 0.5}, {"scale_grad_by_freq": True}], ids=str)
def test_embeddings_with_options(options):
    model = Table(**options)
    before = model.embed.weight.detach().clone()
    batches = [(torch.randint(0, 10, (b, t)), draw(b, 3)) for b, t in ((4, 5), (3, 2))]
    for rule in ("exact", "batch"):
        fisher = estimate_fisher(model, batches, squared_error, rule=rule)
        assert torch.equal(model.embed.weight, before)
    fisher = estimate_fisher(model, batches, squared_error)
    expected = one_by_one(model, batches, squared_error)
    for name in fisher:
        torch.testing.assert_close(fisher[name], expected[name], rtol=EXACT, atol=0)


class Counting(OneLinear):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", None)

    def forward(self, x):
        self.calls = self.calls + 1
        self.seen = x
        return self.linear(x).sum(1)


def test_buffers_that_are_replaced():
    model = Counting()
    before = model.calls
    estimate_fisher(model, [(draw(4, 5, 6), draw(4, 3))], squared_error)
    assert model.calls is before and float(before) == 0 and model.seen is None


def test_dropout_draws_once_for_both_passes():
    class Dropped(OneLinear):
        def forward(self, x, length):
            order = length.argsort(descending=True)
            return F.dropout(self.linear(self.inner(x[order])), 0.5, self.training).sum(1)[order.argsort()]

    fisher = estimate_fisher(Dropped(), [ordered(*FALLING)] * 3, squared_error, train_mode=True)
    assert not any(note.startswith("one example") for note in fisher.notes.values() if note != "no gradient")
