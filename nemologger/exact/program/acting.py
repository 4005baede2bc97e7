"""What a callback without a state counts, and changes training by: read from its source.

``self.steps += 1`` and ``print(self.steps)`` are its own business. ``if self.steps > 10: pl_module.weight = 0.5`` is not.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator
from types import FunctionType
from typing import Any, TypeGuard

from nemologger.exact.program.effects import TELLING, Effects, calls_in, source_of, targets_of
from nemologger.exact.program.uses import methods_of
from nemologger.exact.reach.code import codes_of_class, is_function_of_the_program, names_in
from nemologger.exact.reach.kinds import SCALARS, classes_of_the_program

#: What is set there tells of training, or ends it.
_TOLD = {
    "should_stop", "logger", "loggers", "experiment", "outputs", "progress_bar_callback", "progress_bar_metrics",
    "callback_metrics", "logged_metrics", "log", "log_dict", "print",
}  # fmt: skip
#: What a method changes: its name begins so, or ends with "_" as those of torch do.
_CHANGING = ("set_", "freeze", "unfreeze", "load_state_dict", "add_param_group")
_OF_A_BAR = ("set_description", "set_postfix")
#: These give what they are given.
_PASSING = {"zip", "enumerate", "list", "tuple", "iter", "next", "reversed", "sorted", "getattr", "filter"}


def acts_by(callback: Any, module: Any, names: Collection[str]) -> list[str]:
    """Those of ``names``, attributes of ``callback``, by which it changes the module, an optimizer or the like."""
    setters = {
        function.__name__
        for kind in classes_of_the_program(module)
        for function, code in codes_of_class(kind)
        if code.fills
    }
    return [name for name in names if _Acting(callback, setters, name.partition(".")[0]).found]


class _Acting:
    def __init__(self, callback: Any, setters: Collection[str], name: str) -> None:
        self._setters = setters
        self._methods = {function.__name__: function for function in methods_of(callback)}
        self._given = {one for function in self._methods.values() for one in _given_to(function)}
        self._name = name
        self._plain = {one for one, value in vars(callback).items() if type(value) in SCALARS} - self._set_later()
        self._seen: set[tuple[FunctionType, bool]] = set()
        acts = any(self._acts(function, anyhow=False) for function in self._methods.values())
        self.found = acts and not all(map(self._sets_first, self._methods.values()))

    def _set_later(self) -> set[str]:
        """The attributes that are set after it was made."""
        sources = [source_of(function) for name, function in self._methods.items() if name != "__init__"]
        nodes = (node for source in sources if source is not None for node in ast.walk(source))
        return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}

    def _sets_first(self, function: FunctionType) -> bool:
        """Whether a method that has to do with it begins with setting it, by nothing that is kept from call to call."""
        source = source_of(function)
        if source is None or not source.args.args:
            return False
        arguments = {argument.arg for argument in source.args.args}
        first = source.args.args[0].arg

        def is_it(node: ast.AST) -> bool:
            return _is_attribute(node, first, self._name)

        statement = next((one for one in source.body if any(map(is_it, ast.walk(one)))), None)
        if statement is None or function.__name__ == "__init__":
            return True
        if not (isinstance(statement, ast.Assign) and any(map(is_it, statement.targets))):
            return False
        read = [*ast.walk(statement.value)]
        own = {node.attr for node in read if isinstance(node, ast.Attribute) and _is_attribute(node, first)}
        local = {node.id for node in read if isinstance(node, ast.Name)} & set(function.__code__.co_varnames)
        return local <= arguments and own <= self._plain

    def _acts(self, function: FunctionType, *, anyhow: bool) -> bool:
        source = source_of(function)
        if source is None:  # nobody can say that it does not
            return function.__name__ != "__init__" and self._name in names_in(function.__code__)
        if (function, anyhow) in self._seen:
            return False
        self._seen.add((function, anyhow))
        first = source.args.args[0].arg if source.args.args and function in self._methods.values() else ""
        others = _Others(source, first, self._given)
        found = Effects(source, lambda node: _is_attribute(node, first, self._name), anyhow=anyhow).found
        return any(
            self._changes(statement, others)
            or any(self._acts(called, anyhow=True) for called in self._called(statement, function, others))
            for statement in found
        )

    def _changes(self, statement: ast.stmt, others: _Others) -> bool:
        if any(others.has(target.value) for target in targets_of(statement) if _is_of_something(target)):
            return True
        for call, name in calls_in(statement):
            if name == "setattr" and call.args and others.has(call.args[0]):
                return True
            in_place = name.endswith("_") and not name.startswith("_")
            tells = name in _TOLD or name.startswith((*TELLING, *_OF_A_BAR))
            changes = not tells and (in_place or name.startswith(_CHANGING) or name in self._setters)
            if changes and isinstance(call.func, ast.Attribute) and others.has(call.func.value):
                return True
        return False

    def _called(self, statement: ast.stmt, function: FunctionType, others: _Others) -> Iterator[FunctionType]:
        """Methods of its own, and functions of the program that are given what it was given: they may do it for it."""
        for call, name in calls_in(statement):
            called = function.__globals__.get(name) if any(map(others.has, call.args)) else None
            called = self._methods.get(name) if _is_attribute(call.func, others.first, name) else called
            if isinstance(called, FunctionType) and is_function_of_the_program(called):
                yield called


class _Others:
    """The names in a method of what it was given, or reaches from there.

    Args:
        source: Of the method.
        first: The name of its own object.
        given: Attributes of that which hold what it was given.
    """

    def __init__(self, source: ast.FunctionDef | ast.AsyncFunctionDef, first: str, given: Collection[str]) -> None:
        self.first = first
        self._given = given
        arguments = [*source.args.posonlyargs, *source.args.args, *source.args.kwonlyargs]
        self._names = {argument.arg for argument in arguments} - {first, "outputs"}
        for node in (*ast.walk(source), *ast.walk(source)):  # a name may be set further down in a loop
            if isinstance(node, ast.For | ast.comprehension):
                self._set([node.target], node.iter)
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                self._set(targets_of(node), node.value)

    def _set(self, targets: Iterable[ast.expr], value: ast.expr) -> None:
        if self.has(value):
            inner = [part for one in targets for part in (ast.walk(one) if isinstance(one, ast.Tuple) else [one])]
            self._names |= {one.id for one in inner if isinstance(one, ast.Name) and one.id != self.first}

    def has(self, node: ast.AST) -> bool:
        """Whether ``node`` leads there."""
        if isinstance(node, ast.Name):
            return node.id in self._names
        if isinstance(node, ast.Attribute):
            own = _is_attribute(node, self.first) and node.attr in self._given
            return node.attr not in _TOLD and (own or self.has(node.value))
        if isinstance(node, ast.Subscript | ast.Starred):
            return self.has(node.value)
        if isinstance(node, ast.Call):
            passes = isinstance(node.func, ast.Name) and node.func.id in _PASSING
            return (
                any(map(self.has, node.args))
                if passes
                else isinstance(node.func, ast.Attribute) and self.has(node.func)
            )
        return False


def _given_to(method: FunctionType) -> Iterator[str]:
    """The attributes in which ``method`` keeps what it was given."""
    source = source_of(method)
    if source is not None and source.args.args:
        first = source.args.args[0].arg
        others = _Others(source, first, ())
        for node in ast.walk(source):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and others.has(node.value):
                for target in targets_of(node):
                    if isinstance(target, ast.Attribute) and _is_attribute(target, first):
                        yield target.attr


def _is_of_something(target: ast.expr) -> TypeGuard[ast.Attribute | ast.Subscript]:
    return isinstance(target, ast.Subscript) or (isinstance(target, ast.Attribute) and target.attr not in _TOLD)


def _is_attribute(node: ast.AST, of: str, name: str | None = None) -> bool:
    """Whether it is ``of.name``, or any attribute of that."""
    if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
        return False
    return node.value.id == of and name in (None, node.attr)
