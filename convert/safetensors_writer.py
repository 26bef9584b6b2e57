"""Writing safetensors tensor by tensor: the library's own writer needs all of them in memory."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, str],
    tensors: Iterator[tuple[str, np.ndarray]],
    bar: tqdm | None = None,
) -> int:
    """Writes one safetensors file.

    Args:
        types: "F32" or "BF16" by name.
        tensors: in any order, each of `shapes` once, of its type.

    Returns:
        The bytes of all tensors.
    """
    width = {"F32": 4, "BF16": 2}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * width[types[name]]
        header[name] = {"dtype": types[name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    left = dict(header)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, x in tensors:
            start, stop = left.pop(name)["data_offsets"]
            assert x.nbytes == stop - start, f"{name}: {x.nbytes} bytes, planned {stop - start}"
            file.seek(8 + len(text) + start)
            file.write(np.ascontiguousarray(x).view(np.uint8).data)
            if bar is not None:
                bar.update(x.nbytes)
    assert not left, f"never written: {sorted(left)}"
    return end
