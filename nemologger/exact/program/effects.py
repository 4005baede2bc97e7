"""What comes of something that a function looks at, read from its source: whether it is only told, or decides.

``if len(self.losses) == 10: self.trainer.should_stop = True`` ends a life, and ``print(self.count)`` tells of one;
``if self.count > 10: pl_module.weight = 0.5`` makes another run of it.
"""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from tokenize import TokenError
from types import FunctionType

#: What calls do that tell, note or end: their names begin so.
TELLING = (
    "print", "log", "append", "extend", "add", "write", "dump", "save", "info", "debug", "warn", "error", "exit", "_exit",
    "kill", "flush", "close", "mkdir", "show", "plot", "open",
)  # fmt: skip
_JUMPS = (ast.Return, ast.Continue, ast.Break)
_STORES = (ast.Assign, ast.AugAssign, ast.AnnAssign)


@lru_cache(maxsize=1024)
def source_of(function: FunctionType) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The source of ``function`` as a tree, if there is one."""
    try:
        with warnings.catch_warnings(action="ignore"):  # python has told the program of its escape sequences
            lines = inspect.getsource(function)
            tree = ast.parse(f"if True:\n{lines}" if lines[:1].isspace() else lines)
    except (OSError, TypeError, SyntaxError, ValueError, TokenError):  # a file may have changed since
        return None
    found = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return next((node for node in found if node.name == function.__name__), None)


class Effects:
    """The statements of a function that use something, or are reached depending on it.

    Args:
        source: Of the function.
        is_looked_at: Whether an expression is that.
        anyhow: Whether the whole function depends on it.
    """

    def __init__(
        self,
        source: ast.FunctionDef | ast.AsyncFunctionDef,
        is_looked_at: Callable[[ast.AST], bool],
        *,
        anyhow: bool = False,
    ) -> None:
        self._is_looked_at = is_looked_at
        self._names: set[str] = set()
        self.found: list[ast.stmt] = []
        for _ in range(2):  # a name may be set further down in a loop
            self.found = []
            self._go_through(source.body, under=anyhow)

    def _depends(self, *nodes: ast.AST | None) -> bool:
        inner = (one for node in nodes if node is not None for one in ast.walk(node))
        return any(self._is_looked_at(one) or (isinstance(one, ast.Name) and one.id in self._names) for one in inner)

    def _go_through(self, body: Sequence[ast.stmt], *, under: bool) -> None:
        for statement in body:
            bodies = [*_bodies(statement)]
            if not bodies:
                self._look_at(statement, under=under)
                continue
            heads = [node for node in ast.iter_child_nodes(statement) if isinstance(node, ast.expr | ast.withitem)]
            within = under or (self._depends(*heads) and not isinstance(statement, ast.With))
            if isinstance(statement, ast.For) and self._depends(statement.iter):
                self._names |= _names_in(statement.target)
            for inner in bodies:
                self._go_through(inner, under=within)
            jumps = any(isinstance(node, _JUMPS) for inner in bodies for one in inner for node in ast.walk(one))
            under = under or (within and jumps and isinstance(statement, ast.If))

    def _look_at(self, statement: ast.stmt, *, under: bool) -> None:
        if under or self._depends(statement):
            self.found.append(statement)
            for target in targets_of(statement):
                self._names |= {target.id} if isinstance(target, ast.Name) else set()


def _bodies(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    for one in (statement, *getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
        for name in ("body", "orelse", "finalbody"):
            if getattr(one, name, None):
                yield getattr(one, name)


def _names_in(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


def targets_of(statement: ast.stmt) -> list[ast.expr]:
    """What ``statement`` sets."""
    if not isinstance(statement, _STORES):
        return []
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return [
        one for target in targets for one in (target.elts if isinstance(target, ast.Tuple | ast.List) else [target])
    ]


def calls_in(statement: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """The calls in it, and the names of what is called."""
    for one in ast.walk(statement):
        if isinstance(one, ast.Call):
            yield one, one.func.attr if isinstance(one.func, ast.Attribute) else getattr(one.func, "id", "")


def decides(function: FunctionType, name: str) -> bool:
    """Whether ``function`` does more with the list ``name``, or for it, than to tell of it or to end a life.

    It may do so if there is no source: where a cell of a notebook begins with ``%%time``, in ``python -``, or in a worker of
    Ray. A record that goes on costs less than a run that goes on wrong. (A lambda has no statements.)
    """
    source = source_of(function)
    if source is None:
        return function.__name__ != "<lambda>"

    def is_list(node: ast.AST) -> bool:
        its_name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
        return its_name == name and isinstance(getattr(node, "ctx", None), ast.Load)

    return not all(_only_tells(statement, name) for statement in Effects(source, is_list).found)


def _only_tells(statement: ast.stmt, name: str) -> bool:
    if isinstance(statement, ast.Expr):
        calls = [called for _, called in calls_in(statement)]
        return not calls or any(called.startswith(TELLING) for called in calls)
    if isinstance(statement, ast.Return):
        return statement.value is None
    targets = [target for target in targets_of(statement) if not isinstance(target, ast.Name)]
    known = {name, "should_stop"}
    return all(known & {getattr(node, "attr", "") for node in ast.walk(target)} for target in targets)
