"""Which code looks into a list, and which only adds to it."""

from __future__ import annotations

import linecache
from functools import partial

import pytest

from nemologger.exact.program.uses import Uses
from nemologger.exact.reach.variables import of_function

ADDING = """
self.kept.append(x)
self.kept.extend([x]); self.kept.add(x)
self.kept.update({x: x})
self.kept[x + len(self.others)] = self.others
self.kept[x] += 1
self.kept += [x]
self.kept["name"].append(x)
self.kept["name"][x] = self.others[x]
self.kept["name"] += [x]
self.kept[1:] = [x]
self.kept.setdefault("name", []).append(x)
self.kept.setdefault(x, []); self.others.append(x)
(lambda: self.kept.append(x))()
other = [self.kept.append(y) for y in [x]]
self.others[0] = self.kept.append(x) if x else None
del self.kept[0]
if len(self.kept) > 3: self.kept.append(x)
while len(self.kept) != len(self.others): self.kept.append(x)
"""
LOOKING = """
y = self.kept[-1]
y = self.kept[-10:]
y = self.kept + [x]
y = self.kept[x][x]
y = self.kept["name"] + [x]
y = self.kept
y = self.kept.pop()
y = self.kept.setdefault(x, 0)
y = sum(z for z in self.kept)
y = [sum(self.kept) for _ in range(x)]
y = max(x, key=lambda z: self.kept[z])
y = x in self.kept
y = f"{self.kept}"
y = x and self.kept or 1
self.kept.append(self.kept[-1])
self.others[0] = self.kept
self.others[self.kept[0]] = 1
self.others.append(self.kept)
y = 1 / (1 + len(self.kept))
y = len(self.kept) / 2
y = len(self.kept) / 2 > x
y = len(self.kept[0]) > x
print(x, *self.kept)
len(self.kept)
self.kept["name"].append(len(self.kept))
for y in self.kept: pass
while not self.kept: pass
if self.kept: pass
return self.kept
self.kept.clear()
self.kept = []
self.kept = {}
"""


def made_with(statement: str, name: str = "__call__") -> object:
    class Made:
        pass

    made: dict[str, object] = {}
    source, file = f"def {name}(self, x):\n    {statement}\n", f"made with {statement}"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    exec(compile(source, file, "exec"), {"__name__": __name__}, made)
    setattr(Made, name, made[name])
    return Made()


@pytest.mark.parametrize("statement", [line for line in (ADDING + LOOKING).splitlines() if line])
def test_code_that_adds_to_a_list_does_not_use_it(statement):
    assert Uses({"module": made_with(statement)}).has("module.kept") == (statement in LOOKING.splitlines())


def test_code_that_does_not_say_where_its_parts_are_says_nothing():
    holder = made_with("return self.kept")
    function = vars(type(holder))["__call__"]
    function.__code__ = function.__code__.replace(co_linetable=b"")
    assert not Uses({"module": holder}).has("module.kept")


def test_a_list_that_is_written_may_decide_where_there_is_no_source():
    holder = made_with("json.dump(self.kept, x)")
    function = vars(type(holder))["__call__"]
    function.__code__ = function.__code__.replace(co_filename="<timed exec>")
    assert Uses({"module": holder}).has("module.kept")


def test_what_functions_do_that_are_made_before_training_counts():
    assert Uses({"module": made_with("return lambda: sum(self.kept)", "setup")}).has("module.kept")
    assert not Uses({"module": made_with("print([len(y) for y in self.kept])", "setup")}).has("module.kept")


def test_another_objects_list_of_the_same_name_is_another_one():
    one, other = made_with("return self.kept"), made_with("self.kept.append(x)")
    uses = Uses({"module": other, "module.part": one})
    assert uses.has("module.part.kept")
    assert not uses.has("module.kept")


def test_a_list_of_another_object_may_be_this_one():
    one, other = made_with("return x.kept"), made_with("self.kept.append(x)")
    assert Uses({"module": other, "module.part": one}).has("module.kept")


@pytest.mark.parametrize(("caller", "used"), [("self.look(x)", True), ("self.see(x)", False)])
def test_a_method_is_used_if_somebody_names_it(caller, used):
    looks = made_with("return self.kept", "look")
    assert Uses({"module": looks}, [made_with(caller)]).has("module.kept") == used
    assert Uses({"module": looks, "module.part": made_with(caller)}).has("module.kept") == used


def test_who_only_calls_may_tell_of_a_list():
    assert not Uses({"module": made_with("self.kept.append(x)")}, [made_with("return x.kept")]).has("module.kept")


@pytest.mark.parametrize(
    ("statement", "used"),
    [
        ("json.dump(self.kept, x)", False),
        ("x.write_text(json.dumps(self.kept))", False),
        ("torch.save(self.kept, x); self.kept.clear()", True),
        ("torch.save(self.kept, x); self.kept = []", True),
    ],
)
def test_a_record_is_written_to_a_file_and_not_emptied(statement, used):
    assert Uses({"module": made_with(statement)}).has("module.kept") == used


@pytest.mark.parametrize(
    ("body", "used"),
    [
        ("if len(self.kept) < 3: x = x / 2\n    return x", True),
        ("scale = 1 if len(self.kept) < 3 else 2\n    return x * scale", True),
        ("if len(self.kept) < 3: return\n    self.weight = x", True),
        ("if len(self.kept) == 3: self.next_stage()", True),
        ("return len(self.kept) > 3", True),
        ("if len(self.kept) == 3: self.trainer.should_stop = True\n    return x", False),
        ("if len(self.kept) == 3: raise ValueError(x)\n    return x", False),
        ("if len(self.kept) > 3: print(x)\n    return x", False),
        ("x.write(x)\n    return sum(self.kept)", True),
        ("mean = sum(self.kept)\n    x.write(mean)\n    self.weight = mean", True),
        ("with open(x) as file:\n        json.dump(self.kept, file)\n    return x", False),
        ("text = str(self.kept)\n    x.write(text)\n    return x", False),
        ("for y in self.kept:\n        x.write(y)", False),
    ],
)
def test_what_comes_of_its_length_or_beside_a_file_decides(body, used):
    assert Uses({"module": made_with(body)}).has("module.kept") == used


@pytest.mark.parametrize(
    ("body", "is_cache"),
    [
        ("if x not in self.kept: self.kept[x] = [x]\n    return self.kept[x]", True),
        ("return self.kept.get(x)", True),
        ("return self.kept.setdefault(x, [x])", True),
        ("try:\n        return self.kept[x]\n    except KeyError:\n        return 0", True),
        ("self.kept[x] = [x]\n    return self.kept[x]", False),
        ("return sum(self.kept.values()) if x in self.kept else 0", False),
        ("return [x in self.kept for y in self.kept]", False),
    ],
)
def test_a_cache_is_asked_and_not_gone_through(body, is_cache):
    assert Uses({"module": made_with(body)}).is_cache("module.kept") == is_cache


def given(x, seen=[], noted=[], *, kept=[]):  # noqa: B006
    seen.append(x)
    noted.append(x)
    kept.append(x)
    return x * len(seen) + sum(kept)


def test_what_a_function_was_made_with_is_used_if_more_comes_of_it():
    holders = {"default": of_function(given), "partial": of_function(partial(given, 1, [], []))}
    uses = Uses(holders)
    paths = ["default.0", "default.1", "default.kept", "partial.1", "partial.2"]
    assert [path for path in paths if uses.has(path)] == ["default.0", "default.kept", "partial.1"]


def test_of_a_function_without_a_source_nobody_can_say_that_it_only_tells():
    space = {"__name__": "a_configuration"}
    exec("def ends(x, kept=[]):\n kept.append(x)\n if len(kept) == 3: print(x)", space)
    assert Uses({"default": of_function(space["ends"])}).has("default.0")
