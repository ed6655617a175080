"""llama.cpp's tensor names for transformers' modules, by gguf-py's own tables.

tensor_names(["model.layers.0.self_attn.q_proj"], "gemma3_text", 26)  # {...: "blk.0.attn_q.weight"}
"""

from collections.abc import Iterable

import gguf

ARCHITECTURES = {"gemma3_text": "gemma3", "gemma3n_text": "gemma3n"}  # where llama.cpp's name is not transformers'


def tensor_names(modules: Iterable[str], model_type: str, layers: int) -> dict[str, str]:
    """The weights inside of layers that llama.cpp has a name for, by module; `model_type` is transformers' or its own.

    Empty for an architecture that gguf-py does not know.
    """
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    arch = known.get(ARCHITECTURES.get(model_type, model_type))
    if arch is None:
        return {}
    table = gguf.get_tensor_name_map(arch, layers)
    found = {}
    for module in modules:
        plain = module.replace("model.language_model.", "model.").replace("language_model.model.", "model.")
        tensor = table.get_name(plain)
        if tensor is not None and tensor.startswith("blk."):
            found[module] = f"{tensor}.weight"
    return found
