"""Contexts that are not what was written."""

from __future__ import annotations

import itertools
import json

import pytest
from ctxmod import Cfg, Model

from nemologger.errors import ContextError
from nemologger.io import load_context


def damaged_texts():
    good = {"type": "leaf", "value": 1}
    pyref = {"type": "pyref", "module": "builtins", "name": "list"}
    yield "truncated", '{"root": {"type": "re'
    yield "empty", ""
    yield "not json", "\x00\x01"
    yield "not an object", "[1]"
    yield "no objects", json.dumps({"root": good})
    yield "no root", json.dumps({"objects": {}})
    yield "dangling", json.dumps({"root": {"type": "ref", "key": "a"}, "objects": {}})
    yield "circle", json.dumps({"root": {"type": "ref", "key": "a"}, "objects": {"a": {"type": "ref", "key": "a"}}})
    yield "no type", json.dumps({"root": {"key": "a"}, "objects": {}})
    yield "odd type", json.dumps({"root": {"type": 3, "items": []}, "objects": {}})
    yield "no items", json.dumps({"root": {"type": pyref}, "objects": {}})
    yield "odd items", json.dumps({"root": {"type": pyref, "items": [1], "metadata": None}, "objects": {}})
    yield "odd leaf", json.dumps({"root": {"type": "leaf", "value": {"a": 1}}, "objects": {}})
    yield "list", json.dumps({"root": [1], "objects": {}})
    yield "deep", "[" * 100_000
    nested = "".join(
        f'"a{i}": {{"type": {json.dumps(pyref)}, "items": [["", {{"type": "ref", "key": "a{i + 1}"}}]],'
        '"metadata": null},'
        for i in range(5000)
    )
    yield "deep references", '{"root": {"type": "ref", "key": "a0"}, "objects": {' + nested + '"a5000": 1}}'


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in damaged_texts()])
def test_a_damaged_file_is_reported_with_its_path(text, tmp_path):
    (tmp_path / "io.json").write_text(text)
    for subpath, build in itertools.product([None, "model"], [True, False]):
        with pytest.raises(ContextError, match=str(tmp_path / "io.json")):
            load_context(tmp_path, subpath, build=build)


def test_every_truncation_of_a_context_is_an_error_of_ours(tmp_path):
    Model(Cfg(dim=1), parts=[1, {"a": (2, 3)}]).io_dump(tmp_path)
    text = (tmp_path / "io.json").read_text()
    for length in range(0, len(text), 97):
        (tmp_path / "io.json").write_text(text[:length])
        with pytest.raises(ContextError):
            load_context(tmp_path)


def test_every_missing_key_is_an_error_of_ours_or_does_not_matter(tmp_path):
    Model(Cfg(dim=1), parts=[1, {"a": (2, 3)}]).io_dump(tmp_path)
    whole = (tmp_path / "io.json").read_text()

    def without_one(node, count):
        """Remove the count-th key of all objects, in document order; return what is left of the count."""
        if isinstance(node, dict):
            for key in list(node):
                if count == 0:
                    del node[key]
                    return -1
                count = without_one(node[key], count - 1)
                if count < 0:
                    return count
        elif isinstance(node, list):
            for child in node:
                count = without_one(child, count)
                if count < 0:
                    return count
        return count

    for count in range(10_000):
        document = json.loads(whole)
        if without_one(document, count) >= 0:
            break
        (tmp_path / "io.json").write_text(json.dumps(document))
        try:
            load_context(tmp_path, build=False)
        except ContextError:
            continue
    assert count > 50
