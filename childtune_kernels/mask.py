"""ChildMask: a child network as packed bits, one bit a weight, by parameter name."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from . import ops
from .files import Envelope, reading, write
from .names import canonical, common_prefix, listed, matching, named_parameters, shortened, unwrapped
from .selection import random_words

_FORMAT, _VERSION = "childtune_kernels.ChildMask", "2"
_ALIGNMENT = 16  # bytes: where each tensor's bits start, in memory and in files


class ChildMask:
    """Which weights belong to the child network (paper, sec. 2.3), for the parameters it names.

    Names are those of the bare model (`names.canonical`): a mask made of a compiled or wrapped model's names is the
    bare model's, and may be asked by either. Parameters that it does not name are trained fully, like a fresh head.

    Bit i of word w is element 32 * w + i in row-major order, so a mask takes one bit a weight: 42 MB for BERT-large.
    The words of all parameters lie in one buffer, sorted by name: set algebra, counts and overlaps are one operation.

    ``a | b``, ``a & b``, ``a ^ b``, ``a - b`` and ``~a`` are the sets' union, intersection, symmetric difference,
    difference and complement, for masks of the same names and shapes, on a's device.

    Args:
        words: name -> int32 [ceil(numel / 32)], spare bits 0; copied, to the first one's device.
        shapes: name -> parameter shape, the same names.

    Raises:
        ValueError: names differ, or become one without their wrappers; a size is negative; words have another dtype or
            count than the shape asks for, or spare bits are set.
    """

    # What tells a part called `module` from DistributedDataParallel, once the mask meets a model; see `fitted`.
    _prefix = ""  # was taken off every name
    _unnamed: frozenset[str] = frozenset()  # names of the model that the mask was fitted to, and does not name

    def __init__(self, words: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]):
        self._prefix = common_prefix(map(unwrapped, shapes))
        words, shapes = _canonical(words), _canonical(shapes)
        if differing := sorted(words.keys() ^ shapes.keys()):
            raise ValueError(f"words and shapes must name the same parameters, got {listed(differing)} in one only")
        self._shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        for name, shape in self._shapes.items():
            if any(size < 0 for size in shape):
                raise ValueError(f"shapes[{name!r}] must have no negative size, got {tuple(shape)}")
        self._starts, total = {}, 0  # sorted: masks of the same model have the same layout, whatever their order
        for name in sorted(self._shapes):
            self._starts[name] = total
            total += _padded(self._shapes[name].numel())
        # one string to compare: 393 shapes, one by one, would take longer than counting an overlap on a GPU
        self._signature = _signature(self._shapes)
        for name, packed in words.items():
            expected = _words(self._shapes[name].numel())
            if packed.dtype != torch.int32 or packed.shape != (expected,):
                raise ValueError(
                    f"words[{name!r}] must be int32 of shape ({expected},), "
                    f"got {packed.dtype} of shape {tuple(packed.shape)}"
                )
        device = next((packed.device for packed in words.values()), torch.device("cpu"))
        padding = torch.zeros(_ALIGNMENT, dtype=torch.int32, device=device)
        pieces = [padding[:0]]
        for name in self._starts:  # one concatenation: a copy each would be 393 launches
            own = words[name]
            pieces += [own.to(device), padding[: _padded(self._shapes[name].numel()) - own.numel()]]
        self._flat = torch.cat(pieces)
        index, valid = self._edges()
        if (self._flat[index] & ~valid).any():
            raise ValueError("words must have spare bits 0 after each parameter's last element, got some set")

    @classmethod
    def from_dense(cls, dense: Mapping[str, Tensor]) -> ChildMask:
        """Pack bool tensors, one a parameter and of its shape.

        Raises:
            TypeError: a tensor is not bool.
        """
        for name, bits in dense.items():
            if not isinstance(bits, Tensor) or bits.dtype != torch.bool:
                raise TypeError(
                    f"mask of {name!r} must be a bool tensor, got {getattr(bits, 'dtype', type(bits).__name__)}"
                )
        return cls({n: ops.pack_bits(b) for n, b in dense.items()}, {n: b.shape for n, b in dense.items()})

    @classmethod
    def random(
        cls,
        shapes: nn.Module | Mapping[str, tuple[int, ...]],
        p: float,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        per_tensor: bool = False,
        impl: str = "auto",
    ) -> ChildMask:
        """Draw a child network of exactly round(p N) of N weights (sec. 4.3, "Random"); see `selection.random_words`.

        Args:
            shapes: a model, or name -> parameter shape.
            p, seed, device, per_tensor, impl: see there.
        """
        if isinstance(shapes, nn.Module):
            shapes = {name: param.shape for name, param in named_parameters(shapes).items()}
        drawn = random_words(_canonical(shapes), p, seed, device=device, per_tensor=per_tensor, impl=impl)
        return cls(dict(zip(shapes, drawn.values(), strict=True)), shapes)

    def to_dense(self, name: str) -> Tensor:
        """Return the bits of one parameter, bool, of its shape."""
        shape = self.shape(name)
        return ops.unpack_bits(self.words(name), shape.numel()).view(shape)

    def words(self, name: str) -> Tensor:
        """Return the packed bits of one parameter, int32 [ceil(numel / 32)]: a view, at a 16-byte boundary."""
        own = self._own(name)
        return self._flat[self._starts[own] :][: _words(self._shapes[own].numel())]

    def shape(self, name: str) -> torch.Size:
        """Return the shape of one parameter.

        Raises:
            KeyError: the mask does not name it.
        """
        return self._shapes[self._own(name)]

    @property
    def device(self) -> torch.device:
        """Where the bits are."""
        return self._flat.device

    def to(self, device: torch.device | str) -> ChildMask:
        """Return the mask on a device; its bits are shared if they are there already."""
        return self._with(self._flat.to(device))

    def count(self, name: str | None = None) -> int:
        """Return how many weights are in the child, of one parameter or of all that are named."""
        return int(ops.popcount_bits(self._flat if name is None else self.words(name)))

    def density(self, name: str | None = None) -> float:
        """Return the child's share of the weights of one parameter, or of all that are named (0.0 where none)."""
        total = sum(shape.numel() for shape in self._shapes.values()) if name is None else self.shape(name).numel()
        return self.count(name) / total if total else 0.0

    def jaccard(self, other: ChildMask, name: str | None = None) -> float:
        """Return the overlap ``|A and B| / |A or B|`` (paper, Fig. 3) of one parameter, or of all that are named.

        Two empty children are equal, so they overlap by 1.0.

        Raises:
            ValueError: the masks are of different models.
        """
        return _jaccard(self._overlap(other, name).tolist())

    def __or__(self, other: ChildMask) -> ChildMask:
        return self._combine(other, torch.bitwise_or)

    def __and__(self, other: ChildMask) -> ChildMask:
        return self._combine(other, torch.bitwise_and)

    def __xor__(self, other: ChildMask) -> ChildMask:
        return self._combine(other, torch.bitwise_xor)

    def __sub__(self, other: ChildMask) -> ChildMask:
        return self._combine(other, lambda a, b: a & ~b)

    def __invert__(self) -> ChildMask:
        flat = ~self._flat
        index, valid = self._edges()
        flat[index] &= valid
        return self._with(flat)

    def fitted(self, names: Iterable[str]) -> ChildMask:
        """Return this mask under the names that a model has for its parameters.

        These are its own, but for a mask made of names that all begin with ``module.``: it may be of a model in
        DistributedDataParallel, or of a model's part that is called so. The model's names tell. The bits are shared.

        Args:
            names: canonical names of all the model's parameters.

        Raises:
            ValueError: the model does not have parameters that the mask names, or has them in both ways.
        """
        names = frozenset(names)
        prefix = self._prefix_in(names)
        if prefix is None:
            unknown = [name for name in self if name not in names]
            raise ValueError(
                f"the mask must name parameters of the model, got {listed(unknown)} beside them; pass a mask of this "
                f"model, or the names of all its parameters; those passed: {listed(sorted(names)) or 'none'}"
            )
        mask = self._with(self._flat)
        mask._shapes = {prefix + name: shape for name, shape in self._shapes.items()}
        mask._starts = {prefix + name: start for name, start in self._starts.items()}
        mask._prefix, mask._unnamed = self._prefix.removeprefix(prefix), names - mask._shapes.keys()
        return mask

    def _prefix_in(self, names: frozenset[str]) -> str | None:
        """Return what to put before this mask's names to have a model's; None if that does not help."""
        prefixes = [self._prefix[:length] for length in range(0, len(self._prefix) + 1, len("module."))]
        fitting = [prefix for prefix in prefixes if all(prefix + name in names for name in self)]
        if len(fitting) > 1:
            raise ValueError(
                f"the mask must name parameters of the model in one way, got {listed(list(self))}, which it has both "
                f"as they are and behind {fitting[-1]!r}; pass a mask that names all the parameters of the model"
            )
        return fitting[0] if fitting else None

    def check(self, other: nn.Module | ChildMask) -> None:
        """Refuse a model that this mask is not for, or a mask of another model.

        A model may have any parameters beside those that the mask names; another mask may not.

        Raises:
            ValueError: naming the parameters that are missing, of other shapes or, in a mask, too many.
        """
        if isinstance(other, ChildMask):
            if self._signature == other._signature:
                return
            what, own, shapes = "the other mask", self._shapes, other._shapes
        else:
            every = {name: param.shape for name, param in named_parameters(other, remove_duplicate=False).items()}
            prefix = self._prefix_in(frozenset(every)) or ""
            own = {prefix + name: shape for name, shape in self._shapes.items()}
            what, shapes = "the model", {name: every[name] for name in own if name in every}
        differing = [name for name in {**own, **shapes} if own.get(name) != shapes.get(name)]
        if differing:
            sides = [{name: tuple(shape) for name, shape in side.items()} for side in (own, shapes)]
            wanted, found = ({name: side.get(name, "none") for name in differing} for side in sides)
            raise ValueError(
                f"{what} must have this mask's parameters, of these shapes; {len(differing)} differ: "
                + shortened([f"{name!r} (expected {wanted[name]}, got {found[name]})" for name in differing])
            )

    @torch.no_grad()
    def prune(self, model: nn.Module) -> None:
        """Set the weights outside the child to zero, in place: the ablation "Prune" of the paper's Table 5.

        There the weights outside the child do not stay at their pretrained values but are removed before fine-tuning.
        An optimizer with this mask leaves them zero. Parameters that the mask does not name stay as they are.

        Raises:
            ValueError: as `check`; nothing has been changed then.
        """
        self.check(model)
        params = named_parameters(model, remove_duplicate=False)
        fitted = self.fitted(params)
        for name in fitted:
            params[name].masked_fill_(~fitted.to_dense(name).to(params[name].device), 0)

    def digest(self) -> str:
        """Return a name for this mask, 32 hexadecimal digits: equal on all ranks and machines for equal masks.

        blake2b over the JSON list of [name, shape] sorted by name, then over each parameter's bits in that order,
        little endian and padded with zeros to a multiple of 16 bytes.
        """
        return _digest(self._signature, [self._flat])

    def save(self, path: str | os.PathLike) -> None:
        """Write the mask as safetensors; a file at ``path`` is replaced at once or not at all.

        Each parameter is one uint8 tensor of its bits, lowest bit first, row-major, padded with zeros to a multiple
        of 16 bytes. Tensors start at 16-byte boundaries of the file, so a memory map of it can be used as it is.
        Metadata: the mask's digest, and the shapes by name, in JSON.
        """
        flat, own = self._flat.cpu(), dict(zip(self._shapes, canonical(self._shapes), strict=True))
        about = {"digest": self.digest(), "prefix": common_prefix(self._shapes) + self._prefix}
        about["shapes"] = json.dumps({own[name]: list(shape) for name, shape in self._shapes.items()})
        padded = {own[n]: flat[start:][: _padded(self._shapes[n].numel())] for n, start in self._starts.items()}
        write(path, _FORMAT, _VERSION, about, {name: words.view(torch.uint8) for name, words in padded.items()})

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> ChildMask:
        """Read a mask that `save` wrote, whatever device it was on.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file holds something else, another format version, or bytes that its digest does not fit.
        """
        with reading(path, _FORMAT, ("1", _VERSION)) as file:
            mask = cls._of_file(file)
        return mask.to(device)

    @classmethod
    def _of_file(cls, file: Envelope) -> ChildMask:
        shapes, packed = json.loads(file.about["shapes"]), file.tensors
        if differing := sorted(packed.keys() ^ shapes.keys()):
            raise ValueError(f"shapes and tensors of different names: {listed(differing)}")
        words = {}
        for name, shape in shapes.items():
            numel, got = torch.Size(shape).numel(), packed[name]
            if got.dtype != torch.uint8 or got.shape != (4 * _padded(numel),):
                raise ValueError(f"{got.dtype} of shape {tuple(got.shape)} for {name!r} of {numel} elements")
            words[name], padding = got.view(torch.int32).split((_words(numel), _padded(numel) - _words(numel)))
            if padding.any():
                raise ValueError(f"set bits after the last element of {name!r}")
        mask, found = cls(words, shapes), digest_under(shapes, words)
        if found != file.about["digest"]:
            raise ValueError(f"bits of digest {found} where {file.about['digest']} was written")
        mask._prefix = file.about.get("prefix", mask._prefix)
        return mask

    def _with(self, flat: Tensor) -> ChildMask:
        mask = copy.copy(self)
        mask._flat = flat
        return mask

    def _combine(self, other: ChildMask, operation: Callable[[Tensor, Tensor], Tensor]) -> ChildMask:
        if not isinstance(other, ChildMask):
            return NotImplemented
        self.check(other)
        return self._with(operation(self._flat, other._flat.to(self.device)))

    def _overlap(self, other: ChildMask, name: str | None = None) -> Tensor:
        """Return how many weights both have, and how many at least one has, int64 [2]."""
        self.check(other)
        a, b = (m._flat if name is None else m.words(name) for m in (self, other))
        return ops.overlap_bits(a, b.to(self.device))

    def _edges(self) -> tuple[Tensor, Tensor]:
        """Return the words that do not stand for 32 elements, int64 [k], and the bits of each that do, int32 [k]."""
        edges = []
        for name, start in self._starts.items():
            numel = self._shapes[name].numel()
            for word in range(numel // 32, _padded(numel)):
                edges.append((start + word, (1 << max(0, numel - 32 * word)) - 1))
        index, valid = torch.tensor(edges, dtype=torch.int64, device=self.device).view(-1, 2).unbind(1)
        return index, valid.to(torch.int32)

    def _own(self, name: str) -> str:
        """Return which of the mask's names a name stands for, wrapped or not."""
        own = None if name in self._unnamed else matching(name, self._shapes)
        if own is None:
            raise KeyError(f"the mask names no parameter {name!r}; it names {len(self)}: {listed(list(self))}")
        return own

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name not in self._unnamed and matching(name, self._shapes) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChildMask):
            return NotImplemented
        return self._signature == other._signature and torch.equal(self._flat, other._flat.to(self.device))

    __hash__ = None

    def __repr__(self) -> str:
        return f"ChildMask({len(self)} parameters, {self.count():,} weights, density {self.density():.4f})"


def jaccard_matrix(masks: Sequence[ChildMask]) -> Tensor:
    """Return the overlap of every two of n masks (paper, Fig. 3), float64 [n, n] on the CPU; see `ChildMask.jaccard`.

    Raises:
        ValueError: the masks are of different models.
    """
    pairs = list(combinations(range(len(masks)), 2))
    counts = [masks[i]._overlap(masks[j]).to(masks[0].device) for i, j in pairs]
    matrix = torch.eye(len(masks), dtype=torch.float64)
    for (i, j), count in zip(pairs, torch.stack(counts).tolist() if counts else (), strict=True):  # one wait for all
        matrix[i, j] = matrix[j, i] = _jaccard(count)
    return matrix


def digest_under(shapes: Mapping[str, Sequence[int]], words: Mapping[str, Tensor]) -> str:
    """Return `ChildMask.digest` for words under names as they are: old files kept those of a wrapped model."""
    padding = {name: _padded(torch.Size(shape).numel()) - len(words[name]) for name, shape in shapes.items()}
    padded = (nn.functional.pad(words[name], (0, padding[name])) for name in sorted(shapes))
    return _digest(_signature(shapes), padded)


def _digest(signature: str, pieces: Iterable[Tensor]) -> str:
    digest = hashlib.blake2b(signature.encode(), digest_size=16)
    for words in pieces:
        digest.update(words.cpu().numpy())
    return digest.hexdigest()


def _signature(shapes: Mapping[str, Sequence[int]]) -> str:
    return json.dumps([[name, list(shapes[name])] for name in sorted(shapes)])


def _canonical(named: Mapping[str, object]) -> dict:
    return dict(zip(canonical(named), named.values(), strict=True))


def _jaccard(counts: Sequence[int]) -> float:
    both, either = counts
    return both / either if either else 1.0


def _words(numel: int) -> int:
    return (numel + 31) // 32


def _padded(numel: int) -> int:
    """Return the words that a parameter takes with its padding."""
    return _words(numel) + -_words(numel) % (_ALIGNMENT // 4)
