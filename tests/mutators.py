"""Faults to put into the sources: mutmut's operators and a few more for Python, single tokens for csrc.

Left out by rule are what cannot change behaviour or only changes texts for people (annotations, docstrings, `__all__`,
`raise` statements, what `require` and `warn` say, comments, `#` lines, csrc's `refuse`), what only a GPU can tell (a
`device=` left out), a second lock (`strict=` of zip), and what any test that runs the line notices (None for a value).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation import mutators


class Mutant(NamedTuple):
    """One fault in one file, between the given lines, from 1; `make` returns the whole source with it."""

    path: str
    first: int
    last: int
    make: Callable[[], str]


def mutants_of(root: Path, path: str) -> list[Mutant]:
    """Return every mutant of a source file, in the order of the file."""
    source = (root / path).read_text(encoding="utf-8")
    return list((_python if path.endswith(".py") else _cpp)(path, source))


_SWAPPED = {"any": "all", "all": "any", "min": "max", "max": "min", "floor": "ceil", "ceil": "floor", "sorted": "list"}
_DROPPED = {"clone", "copy", "detach", "contiguous", "float", "double", "long", "flatten", "abs", "cpu"}
_TEXTS = {"require": 2, "warn": None}  # functions that tell people something, and the argument that is no text


def _other_name(node: cst.Name) -> Iterator[cst.CSTNode]:
    if node.value in _SWAPPED:
        yield node.with_changes(value=_SWAPPED[node.value])


def _dropped_conversion(node: cst.Call) -> Iterator[cst.CSTNode]:
    if isinstance(node.func, cst.Attribute) and node.func.attr.value in _DROPPED:
        yield node.func.value


def _forced_condition(node: cst.If) -> Iterator[cst.CSTNode]:
    for outcome in ("False", "True"):
        yield node.with_changes(test=cst.Name(outcome), whitespace_before_test=cst.SimpleWhitespace(" "))


def _dropped_call(node: cst.Expr) -> Iterator[cst.CSTNode]:
    if isinstance(node.value, cst.Call):
        yield cst.Pass()


def _first_of_string(node: cst.BaseString) -> Iterator[cst.CSTNode]:
    yield from list(mutators.operator_string(node))[:1]  # the others differ from it in capitals only


def _dropped_keyword(node: cst.Call) -> Iterator[cst.CSTNode]:
    for i, arg in enumerate(node.args):
        if arg.keyword and arg.keyword.value not in ("device", "strict"):
            yield node.with_changes(args=[*node.args[:i], *node.args[i + 1 :]])


def _swapped_arguments(node: cst.Call) -> Iterator[cst.CSTNode]:
    for i, (a, b) in enumerate(zip(node.args, node.args[1:], strict=False)):
        ordered = getattr(node.func, "value", None) not in ("min", "max") and not a.value.deep_equals(b.value)
        if ordered and not (a.keyword or a.star or b.keyword or b.star):
            pair = a.with_changes(value=b.value), b.with_changes(value=a.value)
            yield node.with_changes(args=[*node.args[:i], *pair, *node.args[i + 2 :]])


_LEFT_OUT = (
    mutators.operator_assignment,
    mutators.operator_lambda,
    mutators.operator_arg_removal,
    mutators.operator_string,
)
_OPERATORS = [(kind, operator) for kind, operator in mutators.mutation_operators if operator not in _LEFT_OUT] + [
    (cst.BaseString, _first_of_string),
    (cst.Name, _other_name),
    (cst.Call, _dropped_conversion),
    (cst.Call, _dropped_keyword),
    (cst.Call, _swapped_arguments),
    (cst.If, _forced_condition),
    (cst.Expr, _dropped_call),
]


class _Collector(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self):
        super().__init__()
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, int, int]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, (cst.Annotation, cst.Raise, cst.Import, cst.ImportFrom)):
            return False
        if isinstance(node, cst.Expr) and isinstance(node.value, (cst.BaseString, cst.ConcatenatedString)):
            return False
        if isinstance(node, cst.Assign) and getattr(node.targets[0].target, "value", None) == "__all__":
            return False
        if isinstance(node, cst.Call):
            name = getattr(node.func, "attr", node.func)
            if getattr(name, "value", None) == "TypeVar":
                return False
            if getattr(name, "value", None) in _TEXTS:
                kept = _TEXTS[name.value]
                if kept is not None and len(node.args) > kept:
                    node.args[kept].visit(self)
                return False
        if isinstance(node, cst.Arg) and node.keyword and node.keyword.value == "strict":
            return False
        place = self.get_metadata(PositionProvider, node.test if isinstance(node, cst.If) else node, None)
        for kind, operator in _OPERATORS if place else ():
            if isinstance(node, kind):
                self.found += [(node, mutated, place.start.line, place.end.line) for mutated in operator(node)]
        return True


def _python(path: str, source: str) -> Iterator[Mutant]:
    wrapper, collector = MetadataWrapper(cst.parse_module(source)), _Collector()
    wrapper.visit(collector)
    for node, mutated, first, last in collector.found:
        yield Mutant(path, first, last, lambda a=node, b=mutated: wrapper.module.deep_replace(a, b).code)


# Binary operators stand between spaces, which template brackets, pointers and references do not.
_BINARY = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "&&": "||", "||": "&&", "+": "-",
           "-": "+", "*": "/", "/": "*", "%": "/", "<<": ">>", ">>": "<<", "&": "|", "|": "&", "^": "|", "+=": "-=",
           "-=": "+=", "*=": "/=", "|=": "&=", "^=": "|=", "<<=": ">>=", ">>=": "<<="}  # fmt: skip
_TOKENS = re.compile(
    r"(?<= )(?P<binary>" + "|".join(sorted(map(re.escape, _BINARY), key=len, reverse=True)) + r")(?= )"
    r"|(?<![\w.])(?P<number>0x[0-9A-Fa-f]+|\d+\.\d+|\d+)(?P<suffix>[uUlL]*f?)(?![\w.])"
    r"|\b(?P<word>true|false|continue)\b"
    r"|(?P<negation>!)(?=[\w(])|(?P<inverse>~)(?=\w)"
    r"|(?<=\n)(?P<check> +(?:if \([^\n]*\) )?check_\w+\([^\n]*\);)(?=\n)"
)
_WORDS = {"true": "false", "false": "true", "continue": "break"}
_CPP_TEXTS = re.compile(
    r'//[^\n]*|(?<=\n)#[^\n]*|"[^"\n]*"|refuse\([^;]*;|message << [^;]*;|static_assert[^;]*;'
    r"|template <[^\n]*|operator\S+"
)


def _other_token(token: re.Match) -> str:
    if token["binary"]:
        return _BINARY[token["binary"]]
    if number := token["number"]:
        more = repr(float(number) + 1) if "." in number else str(int(number, 0) + 1)
        return more + token["suffix"]
    return _WORDS.get(token["word"], "")


def _cpp(path: str, source: str) -> Iterator[Mutant]:
    code = _CPP_TEXTS.sub(lambda text: re.sub(r"[^\n]", " ", text[0]), source)
    for token in _TOKENS.finditer(code):
        start, end = token.span()
        line = source.count("\n", 0, start) + 1
        changed = source[:start] + _other_token(token) + source[end:]
        yield Mutant(path, line, line, lambda changed=changed: changed)
