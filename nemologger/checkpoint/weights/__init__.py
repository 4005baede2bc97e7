"""``weights/`` in the format of torch's distributed checkpoint (DCP). The only package that imports DCP.

    layout.py         where each piece of a tensor lies in a file
    metadata_file.py  ``.metadata``, which says so
    unpickler.py      what a ``.metadata`` may name; untouched.py: and must leave as it is
    memo.py           how much memory a ``.metadata`` makes Python set aside before anything of it is seen
    overlap.py        what parts of a tensor share
    places.py         where the bytes of tensors lie
    ordinary.py       all of it read as DCP does
    common.py         ``common.pt`` and ``metadata.json``
    reading.py        what cannot be read is an error that names the file

Reading runs no code of the file: ``.metadata`` is unpickled with an allow-list, and everything else by
``torch.load(weights_only=True)``.
"""

from __future__ import annotations

from torch.distributed.checkpoint.metadata import Metadata as Metadata

from nemologger.checkpoint.weights.common import BACKEND as BACKEND
from nemologger.checkpoint.weights.common import dump_common as dump_common
from nemologger.checkpoint.weights.common import read_common as read_common
from nemologger.checkpoint.weights.layout import Entry as Entry
from nemologger.checkpoint.weights.layout import Place as Place
from nemologger.checkpoint.weights.layout import entries as entries
from nemologger.checkpoint.weights.layout import lay_out as lay_out
from nemologger.checkpoint.weights.metadata_file import described as described
from nemologger.checkpoint.weights.metadata_file import metadata as metadata
from nemologger.checkpoint.weights.metadata_file import read_metadata as read_metadata
from nemologger.checkpoint.weights.metadata_file import shapes_in as shapes_in
from nemologger.checkpoint.weights.ordinary import read_ordinary as read_ordinary
from nemologger.checkpoint.weights.overlap import Box as Box
from nemologger.checkpoint.weights.overlap import common as common
from nemologger.checkpoint.weights.places import Move as Move
from nemologger.checkpoint.weights.places import Payload as Payload
from nemologger.checkpoint.weights.places import payloads as payloads
from nemologger.checkpoint.weights.places import without as without
