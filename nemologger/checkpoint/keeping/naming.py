"""The name of a checkpoint, from the user's template. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

import xxhash

from nemologger.errors import ConfigurationError
from nemologger.names import REPLACED, UNFINISHED

# A field, or a run of text without a dash or a brace.
_TOKEN = re.compile(r"\{(?P<name>[^:}]*)(?P<spec>:[^}]*)?\}|(?P<text>[^-{}]+|-|[{}])")
_LONGEST = 200  # bytes; file systems take 255, and the suffixes need some


def format_name(template: str, values: Mapping[str, object], *, insert_names: bool = True) -> str:
    """Fill ``template`` in.

    Args:
        template: Text with fields, for example ``"gpt--{val_loss:.4f}-{epoch}-{step}"``.
        values: What the fields stand for. A field whose value is not there is left out, with the text before it (or, if
            it comes first, behind it) and one dash: a metric that does not exist yet is never shown as 0.
        insert_names: Write ``val_loss=1.2345`` rather than ``1.2345``; never before a text.

    Returns:
        A name for a directory. Slashes, as in ``val/loss``, become underscores; one that is too long ends in a hash.

    Raises:
        ConfigurationError: If a value does not take the format that the template asks for, or the name would end like
            one of a checkpoint that is being written.

    Example:
        >>> format_name("gpt--{val_loss:.2f}-{epoch}-{step}", {"val_loss": 1.5, "epoch": 0, "step": 10})
        'gpt--val_loss=1.50-epoch=0-step=10'
        >>> format_name("gpt--{val_loss:.2f}-{epoch}-{step}", {"epoch": 0, "step": 10})
        'gpt--epoch=0-step=10'
    """
    parts: list[list[str]] = [[]]  # between dashes, each a row of texts and filled fields
    is_text = behind_gap = False
    for token in _TOKEN.finditer(template):
        part = parts[-1]
        if token["text"] == "-":
            parts.append([])
            is_text = behind_gap = False
        elif token["text"] is not None:
            if not behind_gap:
                part.append(token["text"])
            is_text, behind_gap = not behind_gap, False
        elif token["name"] in values:
            name, shown = token["name"], _format(template, token["name"], token["spec"] or "", values)
            # A word such as the model's name speaks for itself.
            part.append(f"{name}={shown}" if insert_names and not isinstance(values[name], str) else shown)
            is_text = behind_gap = False
        else:
            if is_text:
                part.pop()
            if not part:
                part.append("")
            behind_gap = part == [""]
            is_text = False
    name = "-".join("".join(part) for part in parts if part != [""])
    return _as_file_name(template, name)


def fields(template: str) -> list[str]:
    """The names of what ``template`` is filled in with.

    Example:
        >>> fields("gpt--{val_loss:.2f}-{step}")
        ['val_loss', 'step']
    """
    return [token["name"] for token in _TOKEN.finditer(template) if token["name"] is not None]


def _as_file_name(template: str, name: str) -> str:
    name = re.sub(r"[\x00-\x1f\x7f/]", "_", name).encode("utf-8", "replace").decode()
    # A name with a dot in front is hidden, and "." and ".." are other directories.
    name = name.lstrip("-.").rstrip("-") or "checkpoint"
    if name.endswith((UNFINISHED, REPLACED)):
        raise ConfigurationError(
            f"filename={template!r} gives {name!r}, but names that end in {UNFINISHED!r} or {REPLACED!r} are for "
            "checkpoints that are being written: call it something else"
        )
    encoded = name.encode()
    if len(encoded) <= _LONGEST:
        return name
    # What is cut off may be the step, which tells one checkpoint from the next.
    digest = xxhash.xxh3_64_hexdigest(encoded)
    return f"{encoded[: _LONGEST - len(digest) - 1].decode(errors='ignore')}-{digest}"


def _format(template: str, name: str, spec: str, values: Mapping[str, object]) -> str:
    try:
        return format(values[name], spec[1:])
    except (ValueError, TypeError) as error:
        raise ConfigurationError(
            f"filename={template!r}: {{{name}{spec}}} cannot be filled with {values[name]!r} ({error})"
        ) from error
