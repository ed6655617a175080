"""The seeds' pathology, planted: the same function in float32, gains above 1 600 and a stream beyond float16's reach.

python -m tests.planted MODEL OUT [K]
"""

import json
import sys
from pathlib import Path

from tasks.core.refs import ModelDir
from tasks.engine.weights.effective import effective_weights
from tasks.engine.weights.rescale import rescaled_weights, write_model


def plant(model: Path, out: Path, k: float = 1024.0, untie: bool = True) -> Path:
    """A copy of a Gemma 3 whose residual stream and post-norm gains are `k` times as large; norms stored in float32.

    Untied, the head keeps its size and the final norm its gains. Tied, the final norm shrinks to gain / k: stored as
    gain / k - 1 that is lost in bfloat16, which breaks the model without any overflow.
    """
    out.mkdir(parents=True, exist_ok=True)
    tensors = list(effective_weights(ModelDir(model)))
    head = next(weight for weight in tensors if weight.name.endswith("embed_tokens.weight"))
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": not untie}
    (out / "config.json").write_text(json.dumps(config, indent=1))
    planted = rescaled_weights([*tensors, head._replace(name="lm_head.weight")] if untie else tensors, out, k)
    write_model(planted, ModelDir(model), out)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    return out


if __name__ == "__main__":
    plant(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 1024.0)
