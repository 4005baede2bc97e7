"""How much memory a pickle makes the unpickler set aside for what it refers back to.

The C unpickler keeps that in a list as long as twice the largest index that the pickle names, whatever that is. One flipped
bit makes ``R`` (call), which a ``.metadata`` has very many of, to ``r`` (keep under an index of four bytes): tens of GB.
"""

from __future__ import annotations

import pickle
import re

#: Opcodes without an argument, or with one of a fixed size; all others are looked at one by one.
_FIXED = re.compile(
    rb"(?:[0-2()\]}NRQ\x81\x85-\x89\x8f-\x94\x97\x98abdelosut]|[K\x80\x82hq].|[M\x83].{2}|[J\x84j].{4}|[G\x95].{8})*+",
    re.DOTALL,
)
#: Those with as many bytes as a number before them says, and the size of that number.
_COUNTED = {
    **dict.fromkeys(b"\x8cCU\x8a", 1),
    **dict.fromkeys(b"XBT\x8b", 4),
    **dict.fromkeys(b"\x8d\x8e\x96", 8),
}
#: Those with lines of text.
_LINES = {**dict.fromkeys(b"FILSVPgp", 1), **dict.fromkeys(b"ci", 2)}


def check_memo(content: bytes) -> None:
    """Look for an index that a pickle as long as ``content`` cannot have got to.

    Raises:
        UnpicklingError: If there is one.
        ValueError: If something else is there where one must be.
    """
    position = 0
    while (position := _FIXED.match(content, position).end()) < len(content):  # type: ignore[union-attr]
        opcode, start = content[position], position + 1
        if (width := _COUNTED.get(opcode)) is not None:
            position = start + width + int.from_bytes(content[start : start + width], "little")
        elif (lines := _LINES.get(opcode)) is not None:
            for _ in range(lines):
                position = content.find(b"\n", position) + 1 or len(content)
            if opcode == ord("p"):
                _check_index(int(content[start:position]), content)
        elif opcode == ord("r"):
            position = start + 4
            _check_index(int.from_bytes(content[start:position], "little"), content)
        else:
            return  # STOP, or something that no pickle has


def _check_index(index: int, content: bytes) -> None:
    if index > len(content):
        raise pickle.UnpicklingError(f"it keeps something under the number {index}, and has {len(content)} bytes")
