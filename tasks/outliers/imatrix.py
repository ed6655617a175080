"""Writes activation statistics as llama.cpp's importance matrix (llama-imatrix's GGUF, tools/imatrix/imatrix.cpp).

For each matrix `<name>.in_sum2`, the sum over tokens of each input channel's square, and `<name>.counts`, the tokens;
the quantizer weighs each channel's error by their quotient.
"""

from pathlib import Path

import gguf
import numpy as np

from tasks.engine.runtimes.ggml_names import tensor_names
from tasks.outliers.activation_statistics import ActivationStatistics

CHUNK = 512  # llama-imatrix's unit; metadata only: rows are not cut into chunks here


class _Writer(gguf.GGUFWriter):
    """gguf-py's writer without `general.architecture`, which an importance matrix does not have."""

    def add_architecture(self) -> None:
        """Does nothing."""


def write_imatrix(
    path: Path, statistics: ActivationStatistics, model_type: str, layers: int, dataset: str
) -> dict[str, str]:
    """Writes the file and returns llama.cpp's name of each linear layer in it, by the layer's own name.

    Layers for which llama.cpp has no tensor name are left out; raises ValueError when it has none for any.
    """
    names = tensor_names(list(statistics.linears), model_type, layers)
    if not names:
        raise ValueError(f"llama.cpp has no tensor names for {model_type!r}: no importance matrix can be written")
    writer = _Writer(path, arch="")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", -(-statistics.tokens // CHUNK))
    writer.add_uint32("imatrix.chunk_size", CHUNK)
    for name, tensor in sorted(names.items(), key=lambda pair: pair[1]):
        channels = statistics.linears[name]
        squares = channels.squares.numpy().astype(np.float32)
        writer.add_tensor(f"{tensor}.in_sum2", squares)
        writer.add_tensor(f"{tensor}.counts", np.array([channels.tokens], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return names
