"""The manifest: what was written is what is read, and anything else is noticed."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.manifest import BLOCK, FORMAT, FileRecord, Manifest, Recorder
from nemologger.errors import DamagedCheckpointError

WHERE = Path("run/checkpoints/a/manifest.json")

floats = st.floats(width=64)
built = st.builds(
    Manifest,
    step=st.integers(0, 2**60),
    epoch=st.integers(0, 1000),
    consumed_samples=st.integers(0, 2**70),
    time=st.floats(0, 4e9),
    metrics=st.dictionaries(st.text(max_size=20), floats, max_size=4),
    owner=st.fixed_dictionaries({"monitor": st.none() | st.text(max_size=5), "mode": st.sampled_from(["min", "max"])}),
    score=st.none() | floats,
    ranked=st.booleans(),
    last=st.booleans(),
    files=st.dictionaries(
        st.text(max_size=20).map(lambda text: f"a{text}".replace("..", "")),
        st.integers(0, 5 * BLOCK).map(lambda size: FileRecord(size, ("00ff",) * max(-(-size // BLOCK), 1))),
        max_size=3,
    ),
)


def _plain(manifest: Manifest) -> tuple:
    """Comparable, nan included."""
    return (replace(manifest, metrics={}, score=None), repr(sorted(manifest.metrics.items())), repr(manifest.score))


@settings(max_examples=200, deadline=None)
@given(built)
def test_it_is_read_as_it_was_written(manifest):
    assert _plain(Manifest.loads(manifest.dumps(), WHERE)) == _plain(manifest)


def test_scores_that_json_lacks_and_odd_names_survive():
    metrics = {"nan": math.nan, "up": math.inf, "down": -math.inf, "val/loss=0.5-step=3": -0.0, "": 1.0, "ü\n\0": 2.0}
    written = Manifest(step=1, epoch=0, metrics=metrics, score=math.nan)
    content = written.dumps()
    json.loads(content, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    read = Manifest.loads(content, WHERE)
    assert repr(read.metrics) == repr(dict(sorted(metrics.items())))
    assert math.isnan(read.score)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_changed_byte_is_noticed(data):
    content = Manifest(step=3, epoch=1, metrics={"val_loss": 0.5}, files={"a": FileRecord(1, ("00",))}).dumps()
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(DamagedCheckpointError):
        # White space may differ, or how a character is written.
        assert Manifest.loads(bytes(changed), WHERE) == Manifest.loads(content, WHERE)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"text"',
        b"3",
        b"\xff\xfe",
        b'{"checksum": 3}',
        b"{" * 50,
        b"[1, 2]",
        b"[" * 200_000,
    ],
)
def test_what_is_no_manifest_is_damaged(content):
    with pytest.raises(DamagedCheckpointError, match="manifest"):
        Manifest.loads(content, WHERE)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_manifest_that_was_cut_off_is_damaged(share):
    content = Manifest(step=3, epoch=1).dumps()
    with pytest.raises(DamagedCheckpointError):
        Manifest.loads(content[: int(len(content) * share)], WHERE)


def _signed(body: dict) -> bytes:
    """As this version would have written it."""
    body.pop("checksum", None)
    checksum = xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode())
    return json.dumps({**body, "checksum": checksum}).encode()


def test_a_newer_format_is_refused_with_what_to_do():
    body = json.loads(Manifest(step=3, epoch=1).dumps())
    with pytest.raises(DamagedCheckpointError, match="update nemologger"):
        Manifest.loads(_signed({**body, "format": FORMAT + 1}), WHERE)


def test_fields_of_a_later_release_are_ignored():
    body = json.loads(Manifest(step=3, epoch=1).dumps())
    assert Manifest.loads(_signed({**body, "colour": "green"}), WHERE).step == 3


def test_a_missing_one_is_damaged_and_named(tmp_path):
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json"):
        manifests.read(tmp_path / "nothing")


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_the_record_of_a_file_does_not_depend_on_how_it_was_written(size):
    content = bytes(size)
    one, many = Recorder(), Recorder()
    list(one.over([content]))
    parts = [content[i : i + 5_000_011] for i in range(0, size, 5_000_011)]
    assert b"".join(many.over(parts)) == content
    assert one.record == many.record
    assert one.record.size == size
    assert one.record.blocks == tuple(
        xxhash.xxh3_64_hexdigest(content[i : i + BLOCK]) for i in range(0, max(size, 1), BLOCK)
    )


@pytest.mark.parametrize(
    ("limits", "finished"),
    [
        ({"max_steps": -1, "max_epochs": None}, False),
        ({"max_steps": -1, "max_epochs": -1}, False),
        ({"max_steps": 10, "max_epochs": None}, True),
        ({"max_steps": 11, "max_epochs": None}, False),
        ({"max_steps": 11, "max_epochs": 2}, True),
        ({"max_steps": -1, "max_epochs": 3}, False),
    ],
)
def test_whether_a_run_is_finished(limits, finished):
    assert Manifest(step=10, epoch=1, epochs_done=2).is_finished(**limits) is finished


def test_newest_is_by_step_then_samples_then_time():
    ordered = [
        Manifest(step=0, epoch=0, consumed_samples=4, time=8.0),
        Manifest(step=0, epoch=0, consumed_samples=8, time=7.0),
        Manifest(step=1, epoch=0, time=9.0),
        Manifest(step=2, epoch=0, time=1.0),
        Manifest(step=2, epoch=0, time=2.0),
    ]
    assert sorted(ordered, key=lambda m: m.order) == ordered


@pytest.mark.parametrize(
    "change",
    [
        {"format": None},
        {"format": "1"},
        {"step": "ten"},
        {"life": None},
        {"ranked": 1},
        {"owner": []},
        {"files": ["a"]},
        {"files": {"a": {"size": "1", "blocks": ["00"]}}},
        {"files": {"a": {"size": 1, "blocks": []}}},
        {"files": {"../../other": {"size": 1, "blocks": ["00"]}}},
        {"files": {"/etc/passwd": {"size": 1, "blocks": ["00"]}}},
        {"metrics": {"a": "much"}},
    ],
)
def test_one_with_the_right_checksum_and_something_else_in_it_is_damaged(change):
    body = {**json.loads(Manifest(step=3, epoch=1).dumps()), **change}
    with pytest.raises(DamagedCheckpointError, match="is not a manifest"):
        Manifest.loads(_signed({key: value for key, value in body.items() if key != "format" or value}), WHERE)


def test_sources_on_the_path_that_nobody_installed_save_too(monkeypatch, tmp_path):
    manifests.versions.__wrapped__()  # imports what it needs
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # without what installed packages say of themselves
    found = manifests.versions.__wrapped__()
    assert found.pop("python") == platform.python_version()
    assert found == dict.fromkeys(("nemologger", "torch", "lightning"), "unknown")
