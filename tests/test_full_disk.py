"""A disk, a real one, that fills up or goes away costs the saves of that time and nothing else (contract C7)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.full_disk import EVERY, ROOMS, STEPS
from processes import environment

HELPERS = Path(__file__).with_name("helpers")
SIZE = 64 << 20
# In a mount namespace of its own: the disk goes with the process that uses it.
MOUNT = {
    "tmpfs": "unshare --map-root-user --mount sh -c 'mount -t tmpfs -o size={size} none {at} && exec \"$@\"' -",
    "ext4": "unshare --mount sh -c 'mount -o loop {image} {at} && exec \"$@\"' -",
}


def on_a_small_disk(kind: str, tmp_path: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run ``command`` while ``tmp_path / "disk"`` is a disk of 64 MiB."""
    at, image = tmp_path / "disk", tmp_path / "image"
    at.mkdir(exist_ok=True)
    if kind == "ext4":
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("there is no mkfs.ext4")
        with image.open("wb") as file:
            file.truncate(SIZE)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    mount = MOUNT[kind].format(size=SIZE, at=at, image=image)
    line = ["sh", "-c", f'exec {mount} "$@"', "-"]
    if shutil.which("unshare") is None or subprocess.run([*line, "true"], capture_output=True).returncode:
        pytest.skip(f"this machine lets nobody mount a {kind}")
    return subprocess.run(
        [*line, *map(str, command)], env=environment(), capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_disk_that_fills_up_in_the_middle_of_a_save(tmp_path, kind, beside):
    command = (sys.executable, HELPERS / "full_disk.py", tmp_path / "disk", *["--beside"] * beside)
    done = on_a_small_disk(kind, tmp_path, *command)
    assert done.returncode == 0, done.stderr[-6000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert [look["step"] for look in told["seen"]] == list(range(EVERY, STEPS, EVERY))
    for look in told["seen"]:
        saved = look["step"] - EVERY * look["full"]
        assert (look["newest"], look["faults"]) == (saved, []), look
        assert look["there"] == [".lock", ".trained_steps", f"step={saved}", f"step={saved}-last"], look
    assert sum(look["full"] for look in told["seen"]) == len(ROOMS)
    assert told["end"] == {"step": STEPS, "newest": STEPS, "faults": []}
    assert done.stderr.count("No space left on device") == len(ROOMS), done.stderr
    assert done.stderr.count("save 1 of at most 3 in a row that may fail") == len(ROOMS)


def test_a_disk_that_is_unmounted_costs_the_saves_until_it_is_back(tmp_path):
    """Nothing is written below its mount, where nobody would find it; what is kept on it is kept."""
    done = on_a_small_disk("tmpfs", tmp_path, sys.executable, HELPERS / "unmounted.py", tmp_path / "disk")
    assert done.returncode == 0, done.stderr[-6000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {"below": [], "there": ["step=4", "step=8-last"], "faults": []}
    assert done.stderr.count("was not saved") == done.stderr.count("at is not mounted any more") == 1
    assert "Training goes on; the newest checkpoint is" in done.stderr
