"""Generators within reach of some objects: their states, and back."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import getattr_static
from typing import Any

import torch

from nemologger.exact.reach.kinds import module_of
from nemologger.exact.reach.look import Look
from nemologger.exact.reach.parts import attributes
from nemologger.exact.reach.variables import set_in
from nemologger.exact.rng import generator_from, generator_state, set_generator_state


def states_of(look: Look) -> dict[str, Any]:
    """The states of the generators, by path."""
    return {path: generator_state(generator) for path, generator in look.generators.items()}


def set_states(look: Look, states: Mapping[str, Any]) -> None:
    """Set those that are there; give objects those that they do not have yet."""
    missing = {}
    for path, state in states.items():
        if path in look.generators:
            set_generator_state(look.generators[path], state)
        else:
            missing[path] = state
    make_generators(look.holders, missing)


def make_generators(holders: Mapping[str, Any], states: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Give objects the generators that they had, and do not have yet: many make one when they first need it.

    Args:
        holders: The objects, by path.
        states: States of generators, by path.
        device: Of generators that are not the CPU's.
    """
    for path, state in states.items():
        where, _, name = path.rpartition(".")
        holder = holders.get(where)
        if holder is not None and attributes(holder).get(name) is None and may_begin(holder, name):
            made = generator_from(state, device)
            if made is not None:
                set_in(holder, name, made)


def may_begin(holder: Any, name: str) -> bool:
    """Whether an object makes such an attribute only when it needs it. What torch's own have is what they were given."""
    return not module_of(type(holder)).startswith("torch.") and not isinstance(
        getattr_static(type(holder), name, None), property
    )
