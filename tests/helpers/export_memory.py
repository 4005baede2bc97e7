"""How much memory an export takes: ``export_memory.py CHECKPOINT OUTPUT...`` prints the bytes at the peak of each."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from nemologger import export_weights


def _memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(checkpoint: Path, *outputs: Path) -> None:
    """Print the peaks."""
    for output in outputs:
        export_weights(checkpoint, output)  # everything is imported now
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _memory("VmRSS")
        export_weights(checkpoint, output)
        print(_memory("VmHWM") - before)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
