"""Finds the submodules whose `.weight` a module's forward uses itself instead of calling the submodule.

Such a layer is never called, so an adapter on it does nothing, fused or not: `WavLMAttention` and
`nn.MultiheadAttention` hand `self.out_proj.weight` to `F.multi_head_attention_forward`. The class's source is
read, once per class: `forward` and every method or property it reaches through `self`.

Not seen: weights read through a local alias (`for layer in self.layers: layer.weight`), through `getattr`,
or by a class without source.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

ANY = "*"
"""Stands for a subscript in a path: `self.layers[i].weight` is ("layers", ANY)."""

# What can be asked of a weight without using its values.
_METADATA = frozenset((
    "data_ptr", "device", "dim", "dtype", "element_size", "grad", "is_contiguous", "is_cuda", "is_meta",
    "is_floating_point", "layout", "ndim", "nelement", "numel", "requires_grad", "shape", "size", "stride",
))  # fmt: skip
_INSPECTIONS = frozenset(("getattr", "hasattr", "id", "isinstance", "type"))


@functools.cache
def weight_reads(cls: type) -> frozenset[tuple[str, ...]]:
    """The paths p, from an instance of `cls`, for which its forward uses the values of `self.p.weight`."""
    reads: set[tuple[str, ...]] = set()
    todo: list[tuple[type, str]] = [(cls, "forward")]
    seen: set[Any] = set()
    while todo:
        start, name = todo.pop()
        owner, function = _definition(cls, start, name)
        if function is None or function in seen:
            continue
        seen.add(function)
        for kind, path in _uses_of_self(function):
            if kind == "weight":
                reads.add(path)
            elif kind == "self":
                todo.append((cls, path[0]))
            else:
                todo.append((_next_class(cls, owner), path[0]))
    return frozenset(reads)


def reads_weight(cls: type, path: str) -> bool:
    """Whether the forward of `cls` uses the weight of its submodule `path`, such as "self_attn.q_proj"."""
    parts = path.split(".")
    return any(
        len(read) == len(parts) and all(r in (ANY, part) for r, part in zip(read, parts, strict=True))
        for read in weight_reads(cls)
    )


def _definition(cls: type, start: type, name: str) -> tuple[type, Callable[..., Any] | None]:
    """The function that `name` finds on `cls` from `start` on in its MRO, and the class that defines it."""
    mro = cls.__mro__
    for owner in mro[mro.index(start) :]:
        if owner is nn.Module or owner is object:
            break
        member = vars(owner).get(name)
        if member is not None:
            member = member.fget if isinstance(member, property) else member
            return owner, inspect.unwrap(member) if inspect.isfunction(member) else None
    return cls, None


def _next_class(cls: type, owner: type) -> type:
    return cls.__mro__[cls.__mro__.index(owner) + 1]


def _uses_of_self(function: Callable[..., Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """("weight", p) for `self.p.weight`, ("self", (m,)) for `self.m`, ("super", (m,)) for `super().m`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) == "super":
            yield "super", (node.attr,)
            continue
        path = _path(node)
        if path is None:
            continue
        if len(path) == 1:
            yield "self", path
        elif path[-1] == "weight" and isinstance(node.ctx, ast.Load) and _uses_values(node, parents[node]):
            yield "weight", path[:-1]


def _path(node: ast.expr) -> tuple[str, ...] | None:
    """The attribute names of `self.a.b[i].c`, or None for an expression that does not start at `self`."""
    names: list[str] = []
    while True:
        match node:
            case ast.Attribute():
                names.append(node.attr)
            case ast.Subscript():
                names.append(ANY)
            case ast.Name(id="self"):
                return tuple(reversed(names))
            case _:
                return None
        node = node.value


def _uses_values(node: ast.expr, parent: ast.AST) -> bool:
    match parent:
        case ast.Attribute():
            return parent.attr not in _METADATA
        case ast.Call(func=ast.Name(id=name)):
            return name not in _INSPECTIONS
        case ast.Compare():
            return not all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops)
    return True
