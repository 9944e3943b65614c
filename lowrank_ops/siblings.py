"""Which children of a module are called on the same tensor, read from the source of its forward pass."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache

__all__ = ["shared_inputs"]

# what runs later, or only perhaps
_SKIPPED = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Lambda,
    ast.IfExp,
    ast.BoolOp,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)


@cache
def shared_inputs(forward: Callable[..., object]) -> tuple[tuple[str, ...], ...]:
    """Return the names of children that ``forward`` calls on one variable, unchanged between the calls.

    ``q = self.q_proj(x)`` and ``k = self.k_proj(x)`` share x if one is executed whenever the other is: both
    stand in one block, and nothing is assigned to x in between. A child called twice shares nothing. Without
    a source there is nothing to be known, and nothing is returned.
    """
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError):
        return ()
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        return ()
    found = [group for block in _blocks(function) for group in _groups(block, function.args.args[0].arg)]
    names = [name for group in found for name in group]
    once = (group for group in found if all(names.count(name) == 1 for name in group))
    return tuple(tuple(group) for group in once if len(group) > 1)


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Yield every list of statements under ``node`` that its own execution runs through."""
    for _, value in ast.iter_fields(node):
        if not isinstance(value, list) or not value:
            continue
        if isinstance(value[0], ast.stmt):
            yield value
        for child in value:
            if isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
                if not isinstance(child, _SKIPPED):
                    yield from _blocks(child)


def _groups(block: list[ast.stmt], owner: str) -> Iterator[list[str]]:
    """Yield the names of the children that the statements of ``block`` call on one variable, for each."""
    called: dict[str, list[str]] = {}
    for statement in block:
        for variable, child in _calls(statement, owner):
            called.setdefault(variable, []).append(child)
        for node in ast.walk(statement):
            match node:
                case (
                    ast.Name(id=name, ctx=ast.Store() | ast.Del())
                    | ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del())
                ) if name in called:
                    yield called.pop(name)
                case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)) if (
                    name in called and method.endswith("_")
                ):
                    yield called.pop(name)
                case ast.Return() | ast.Break() | ast.Continue():
                    yield from called.values()
                    called.clear()
    yield from called.values()


def _calls(node: ast.AST, owner: str) -> Iterator[tuple[str, str]]:
    """Yield (variable, child) for every ``owner.child(variable)`` that ``node`` always evaluates."""
    if isinstance(node, _SKIPPED):
        return
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            yield from _calls(child, owner)
    match node:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id=name), attr=child),
            args=[ast.Name(id=variable)],
            keywords=[],
        ) if name == owner:
            yield variable, child
