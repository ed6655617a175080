"""llama.cpp's tensor names for transformers' modules, by gguf-py's own tables.

tensor_names(["model.layers.0.self_attn.q_proj"], "gemma3_text", 26)  # {...: "blk.0.attn_q.weight"}
"""

from collections.abc import Iterable

import gguf

from tasks.engine.models.family_registry import family_of


def tensor_names(modules: Iterable[str], model_type: str, layers: int) -> dict[str, str]:
    """llama.cpp's names of layer weights by transformers' module names; `model_type` is transformers' or llama.cpp's.

    Empty for an architecture that gguf-py does not know.
    """
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    arch = architectures.get(family_of(model_type).gguf_architectures.get(model_type, model_type))
    if arch is None:
        return {}
    table = gguf.get_tensor_name_map(arch, layers)
    names = {}
    for module in modules:
        module_name = module.replace("model.language_model.", "model.").replace("language_model.model.", "model.")
        tensor = table.get_name(module_name)
        if tensor is not None and tensor.startswith("blk."):
            names[module] = f"{tensor}.weight"
    return names
