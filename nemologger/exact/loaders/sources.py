"""Which way to begin, and to begin in the middle, fits a loader."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from nemologger.exact import libraries, port
from nemologger.exact.loaders.map_style import MapStyle
from nemologger.exact.loaders.replayed import Replayed
from nemologger.exact.loaders.source import Source, has_state
from nemologger.exact.loaders.with_state import IterableWithState, WithState


def source_of(loader: Any) -> Source:
    """The way that fits ``loader``."""
    if not isinstance(loader, DataLoader):
        return WithState(loader) if has_state(loader) else Replayed(loader)
    own_state = has_state(loader) and not libraries.is_of_torchdata(loader)
    if port.is_map_style(loader):
        return WithState(loader) if own_state else MapStyle(loader)
    if own_state:
        return WithState(loader)
    if not has_state(loader.dataset) or libraries.has_shuffle_buffer(loader.dataset):
        return Replayed(loader)
    if loader.num_workers == 0:
        return IterableWithState(loader)
    if libraries.is_of_torchdata(loader):
        return WithState(loader)
    return WithState(loader) if type(loader) is DataLoader else Replayed(loader)
