"""What the code of a program does with its lists and dictionaries while it trains, read from the code itself.

A list that is only added to (``self.losses.append(...)``) says nothing to the code. One that it looks into
(``np.mean(self.losses[-10:])``), hands on or empties decides about what it does next. To write a list to a
file is what is done with a record, and so is to compare how long it is (``len(self.losses) == 10``), unless
something else comes of that in the same function.

A dictionary that is gone through, or read without a question whether it has a key, is no cache.
"""

from __future__ import annotations

import dis
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from nemologger.exact.program.effects import decides
from nemologger.exact.reach.code import functions_of, is_class_of_the_program
from nemologger.exact.reach.kinds import classes_of_the_program
from nemologger.exact.reach.mentioned import functions_within
from nemologger.exact.reach.variables import Variables

#: What these make, empty or read is so at the start of each life; functions that are made there may be called later.
_BEFORE = {"__init__", "setup", "configure_model", "configure_optimizers", "on_fit_start", "on_train_start"}
#: These are called when it is over, in other stages, for a checkpoint, or for somebody who reads.
_AFTER = {
    "on_train_end", "on_fit_end", "on_exception", "teardown",
    "on_save_checkpoint", "on_load_checkpoint", "state_dict", "load_state_dict",
    "__getstate__", "__setstate__", "__repr__", "__str__",
}  # fmt: skip
_OTHER_STAGES = ("test_", "predict_", "on_test_", "on_predict_")

_LOADS = {"LOAD_ATTR", "LOAD_GLOBAL", "LOAD_DEREF"}
_ADDING = {"append", "appendleft", "extend", "add", "update"}
#: After these an item of it is in its place.
_WITHIN = {"BINARY_SUBSCR", "CALL"}
#: After these nothing is left of it to be looked into.
_AT_THE_END = {"STORE_SUBSCR", "STORE_SLICE", "DELETE_SUBSCR", "POP_TOP"}
_EMPTY = {"BUILD_LIST", "BUILD_MAP"}
_EMPTYING = {"clear", "pop", "popleft", "popitem", "remove"}
#: A function that names one of these writes what it looks into.
_WRITING = {
    "dump", "dumps", "write", "write_text", "write_bytes", "writelines", "writerow", "writerows", "save", "savez", "savetxt",
}  # fmt: skip
_ADDS, _COUNTS, _EMPTIES, _LOOKS, _ASKS, _GOES_THROUGH = "adds", "counts", "empties", "looks", "asks", "goes through"
_OF_DICTIONARIES = {"get": _ASKS, "values": _GOES_THROUGH, "items": _GOES_THROUGH}
#: Of no interest.
_MOVES = {"COPY", "SWAP", "PRECALL", "EXTENDED_ARG", "TO_BOOL"}


class Uses:
    """Which attributes are used by code that runs while a program trains, as far as names tell.

    That are methods with the name of one that the object has of a library, which calls it, and what these name in turn.

    Args:
        holders: The objects of the program, by path.
        callers: Others, of which only is looked at whom they call: a callback may read a list to tell of it.
    """

    def __init__(self, holders: Mapping[str, Any], callers: Iterable[Any] = ()) -> None:
        self._methods = {path: methods_of(holder) for path, holder in holders.items()}
        self._functions: dict[str, Any] = {
            path: holder.function for path, holder in holders.items() if type(holder) is Variables
        }
        self._of_somebody = {method for methods in self._methods.values() for method in methods}
        by_name: dict[str, set[FunctionType]] = defaultdict(set)
        for method in self._of_somebody:
            by_name[method.__name__].add(method)
        kinds = {id(type(holder)): type(holder) for holder in holders.values()}
        called = {name for kind in kinds.values() for name in _of_libraries(kind)}
        called |= _BEFORE.union(name for name in by_name if name.startswith("__"))
        called |= {name for caller in callers for method in methods_of(caller) for name in _names_in(method)}
        waiting = [method for name in called for method in by_name.get(name, ())]
        # Of functions that are kept it is not known who calls them.
        waiting += [function for function in self._functions.values() if isinstance(function, FunctionType)]
        self._running: set[FunctionType] = set()
        while waiting:
            function = waiting.pop()
            if function not in self._running:
                self._running.add(function)
                waiting += () if function.__name__ in _BEFORE else functions_within(function)
                waiting += [method for name in _names_in(function) for method in by_name.get(name, ())]
        self._known: dict[str, bool] = {}

    def has(self, path: str) -> bool:
        """Whether code looks into what is at ``path``, hands it on or empties it."""
        if path not in self._known:
            self._known[path] = self._is_argument_that_decides(path) or any(
                use.does != _ADDS and (use.does == _EMPTIES or _is_more_than_told(function, use))
                for function, use in self._uses_of(path)
            )
        return self._known[path]

    def _is_argument_that_decides(self, path: str) -> bool:
        """Whether a function was made with it, as a default or in a partial, and does more with it than to tell."""
        holder, _, name = path.rpartition(".")
        function = self._functions.get(holder)
        first = 0 if isinstance(function, partial) else -len(getattr(function, "__defaults__", None) or ())
        while isinstance(function, partial):
            function = function.func
        if not isinstance(function, FunctionType):
            return False
        names, count = function.__code__.co_varnames, function.__code__.co_argcount
        name = names[:count][first + int(name)] if name.isdigit() and int(name) < count else name
        return name in names and decides(function, name)

    def is_cache(self, path: str) -> bool:
        """Whether a dictionary at ``path`` may be one: code asks whether it has a key, and does not go through it."""
        uses = [*self._uses_of(path)]
        asks = any(use.does == _ASKS or {"KeyError", "setdefault"} & _names_in(function) for function, use in uses)
        return asks and not any(use.does == _GOES_THROUGH for _, use in uses)

    def _uses_of(self, path: str) -> Iterator[tuple[FunctionType, _Use]]:
        holder, _, name = path.rpartition(".")
        others = self._of_somebody.difference(() if ":" in path else self._methods.get(holder, ()))
        for function in self._running:
            if name in _names_in(function):
                for use in _uses_in(function):
                    if use.name == name and not (use.of_self and function in others):
                        yield function, use


def _is_more_than_told(function: FunctionType, use: _Use) -> bool:
    if use.does != _COUNTS and _WRITING.isdisjoint(_names_in(function)):
        return True
    return function.__name__ not in _BEFORE and decides(function, use.name)


def methods_of(holder: Any) -> list[FunctionType]:
    """Those that the program has written, and that may run before it trains, or while."""
    methods = [method for kind in classes_of_the_program(holder) for method in functions_of(kind)]
    return [method for method in methods if not _is_of_another_time(method.__name__)]


def _is_of_another_time(name: str) -> bool:
    return name in _AFTER or name.startswith(_OTHER_STAGES)


def _of_libraries(kind: type) -> set[str]:
    """The names of what ``kind`` has of libraries, and of python."""
    return {name for base in kind.__mro__ if not is_class_of_the_program(base) for name in vars(base)}


@lru_cache(maxsize=4096)
def _names_in(function: FunctionType) -> frozenset[str]:
    return frozenset(name for code in _codes_of(function) for name in (*code.co_names, *code.co_freevars))


def _codes_of(function: FunctionType) -> Iterator[CodeType]:
    """Of what runs while it trains: the function with those within it, or only these."""
    whole = _with_inner(function.__code__)
    if function.__name__ not in _BEFORE:
        yield from whole
        return
    for code in whole:
        if code is not function.__code__ and (code.co_name == "<lambda>" or not code.co_name.startswith("<")):
            yield code


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


# --- instructions -----------------------------------------------------------------------------------------------------


class _Use(NamedTuple):
    name: str
    of_self: bool
    does: str


@lru_cache(maxsize=1024)
def _uses_in(function: FunctionType) -> frozenset[_Use]:
    first = function.__code__.co_varnames[:1] if function.__code__.co_argcount else ()
    return frozenset(use for code in _codes_of(function) for use in _uses(code, first))


def _uses(code: CodeType, first: tuple[str, ...]) -> Iterator[_Use]:
    instructions = [one for one in dis.get_instructions(code) if one.opname not in _MOVES]
    begin_there: dict[Any, list[dis.Instruction]] = defaultdict(list)
    for one in instructions:
        begin_there[_begin(one)].append(one)
    nothing = instructions[0]
    after = [*instructions[2:], nothing]
    for earlier, before, one, following in zip(
        [nothing, *instructions], instructions, instructions[1:], after, strict=False
    ):
        loaded = before.argval if isinstance(before.argval, tuple) else (before.argval,)  # two at once, since 3.13
        of_self = loaded[-1:] == first
        if one.opname == "STORE_ATTR" and earlier.opname in _EMPTY and not earlier.arg:
            yield _Use(one.argval, of_self, _EMPTIES)
        elif one.opname in _LOADS and "NULL" not in one.argrepr:  # which is there for a call: that is of no list
            does = _what_is_done(one, begin_there[_begin(one)])
            caller = earlier if one.opname == "LOAD_ATTR" else before
            is_counted = following.opname == "CALL" and _is_length_compared(caller, begin_there[_begin(caller)])
            does = _COUNTS if is_counted else _ASKS if following.opname == "CONTAINS_OP" else does
            yield _Use(one.argval, of_self, _GOES_THROUGH if following.opname == "GET_ITER" else does)


def _is_length_compared(caller: dis.Instruction, begin_there: list[dis.Instruction]) -> bool:
    is_len = caller.opname == "LOAD_GLOBAL" and caller.argval == "len"
    after = [one.opname for one in begin_there if one.offset > caller.offset]
    return is_len and after[:2] == ["CALL", "COMPARE_OP"]


def _what_is_done(loaded: dis.Instruction, begin_there: list[dis.Instruction]) -> str:
    """What does something to ``self.losses`` begins where that does."""
    if _begin(loaded)[1] is None:  # nobody can say: python was told not to keep where instructions begin
        return _ADDS
    for one in begin_there:
        if one.offset <= loaded.offset:
            continue
        if one.opname in ("LOAD_ATTR", "LOAD_METHOD") and one.argval != "setdefault":
            does = _ADDS if one.argval in _ADDING else _EMPTIES if one.argval in _EMPTYING else _LOOKS
            return _OF_DICTIONARIES.get(one.argval, does)
        if one.opname in _AT_THE_END or (one.opname == "BINARY_OP" and one.argrepr.endswith("=")):
            return _ADDS
        if not (one.opname in _WITHIN or one.argval == "setdefault" or one.argrepr == "[]"):
            return _LOOKS
    return _LOOKS


def _begin(one: dis.Instruction) -> tuple[int | None, int | None]:
    where = one.positions
    return (where.lineno, where.col_offset) if where is not None else (None, None)
