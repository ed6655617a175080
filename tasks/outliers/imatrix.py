"""llama.cpp's importance matrix (llama-imatrix's GGUF, tools/imatrix/imatrix.cpp) from what was observed.

For each matrix `<name>.in_sum2`, the sum over tokens of each input channel's square, and `<name>.counts`, the tokens;
the quantizer weighs each channel's error by their quotient.
"""

from pathlib import Path

import gguf
import numpy as np

from tasks.engine.runtimes.ggml_names import tensor_names
from tasks.outliers.layer_statistics import Activations

CHUNK = 512  # llama-imatrix's unit; only for show here, since rows are not cut into chunks


class _Writer(gguf.GGUFWriter):
    """gguf-py's writer without an architecture, which an importance matrix has not."""

    def add_architecture(self) -> None:
        """Nothing, where a model's file names its architecture."""


def write_imatrix(path: Path, seen: Activations, model_type: str, layers: int, dataset: str) -> dict[str, str]:
    """Writes the file; returns llama.cpp's name of each linear layer in it, by the model's own. Layers of which
    llama.cpp knows no tensor are left out; a ValueError says when it knows none."""
    names = tensor_names(list(seen.linears), model_type, layers)
    if not names:
        raise ValueError(f"llama.cpp has no tensor names for {model_type!r}: no importance matrix can be written")
    writer = _Writer(path, arch="")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", -(-seen.tokens // CHUNK))
    writer.add_uint32("imatrix.chunk_size", CHUNK)
    for name, tensor in sorted(names.items(), key=lambda pair: pair[1]):
        channels = seen.linears[name]
        squares = channels.squares.numpy().astype(np.float32)
        writer.add_tensor(f"{tensor}.in_sum2", squares)
        writer.add_tensor(f"{tensor}.counts", np.array([channels.tokens], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return names
