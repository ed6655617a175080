"""Merges a PEFT adapter into rows of the base: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353).

W' = W + s B A with s = alpha / r, or alpha / sqrt(r) for rsLoRA; DoRA then scales each row to its learned magnitude:
W' = m (W + s B A) / |W + s B A|, the norm taken row by row. All in float32.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.core.errors import BadConfig
from tasks.engine.weights.adapter_names import base_name, check_mergeable, is_copy, why_unmatched
from tasks.engine.weights.nf4 import FourBitTensor
from tasks.engine.weights.safetensors_reader import StoredTensor, stored_tensors

RowTransform = Callable[[Tensor, int, int], Tensor]
"""(rows `start` to `stop` of a weight in float32, start, stop) -> these rows with the adapter merged, float32."""

PREFIX = "base_model.model."
PARTS = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?$")


class Adapter(NamedTuple):
    """An adapter's tensors by the base tensor that they change: `parts[name]` as A, B, magnitude; or a replacement."""

    directory: Path
    config: dict[str, Any]
    parts: dict[str, dict[str, StoredTensor]]
    replacements: dict[str, StoredTensor]
    paths: dict[str, str]

    @classmethod
    def read(cls, directory: Path, base: Mapping[str, StoredTensor | FourBitTensor]) -> "Adapter":
        """Raises BadConfig for an unmergeable kind of adapter, or a tensor that fits no tensor of `base`."""
        config = json.loads((directory / "adapter_config.json").read_text())
        check_mergeable(directory, config)
        parts: dict[str, dict[str, StoredTensor]] = {}
        replacements: dict[str, StoredTensor] = {}
        paths: dict[str, str] = {}
        tensors = stored_tensors(directory, "adapter_model")
        for key, stored in tensors.items():
            path = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            match = PARTS.search(path)
            target = path[: match.start()] + ".weight" if match else path
            name = base_name(target, base)
            if match is None and is_copy(stored, name, target, tensors, base):
                continue
            if name is None:
                raise BadConfig(f"{directory}: {key} {why_unmatched(target)}")
            if match:
                parts.setdefault(name, {})[match[1].replace("embedding_", "")] = stored
                paths[name] = path[: match.start()]
                if match[1].startswith("lora_embedding"):
                    parts[name]["transposed"] = stored
            else:
                replacements[name] = stored
        adapter = cls(directory, config, parts, replacements, paths)
        for name in [*parts, *replacements]:
            adapter._check_shape(directory, name, base[name].shape)
        return adapter

    def replacement(self, name: str) -> StoredTensor | None:
        """The tensor that replaces the base's, from `modules_to_save`."""
        return self.replacements.get(name)

    def check_scalable(self) -> None:
        """Raises BadConfig for an adapter whose change of the base cannot be scaled."""
        if self.replacements:
            raise BadConfig(
                f"{self.directory} replaces {min(self.replacements)} (modules_to_save), which cannot be "
                "scaled: merge it with weight 1"
            )
        if self.config.get("use_dora"):
            raise BadConfig(
                f"{self.directory} is a DoRA adapter: it rescales whole rows, so its change cannot be scaled. "
                "Merge it with weight 1"
            )

    def transform(self, name: str) -> RowTransform | None:
        """The transform of the base tensor `name`; None where the adapter does not change it."""
        if name not in self.parts:
            return None
        parts = self.parts[name]
        scale = self._scale(name, parts["lora_A"].shape[0])

        def change(
            rows: Tensor, start: int, stop: int
        ) -> Tensor:  # reads A and B when called, so that weights hold no tensors
            a, b = parts["lora_A"].rows().float(), parts["lora_B"].rows().float()  # [r, in], [out, r]
            if "transposed" in parts:  # an embedding's A is [r, vocabulary], its B [hidden, r]
                a, b = b.T, a.T
            changed: Tensor = torch.addmm(rows, b[start:stop], a, alpha=scale)
            if "lora_magnitude_vector" not in parts:
                return changed
            magnitude = parts["lora_magnitude_vector"].rows().float().flatten()[start:stop]
            return torch.mul(changed, (magnitude / changed.norm(dim=1)).unsqueeze(1))

        return change

    def _scale(self, name: str, rank: int) -> float:
        alpha = self.config["lora_alpha"]
        for pattern, special in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", self.paths[name]):
                alpha = special
                break
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def _check_shape(self, directory: Path, name: str, shape: tuple[int, ...]) -> None:
        parts = self.parts.get(name)
        if parts is None:
            adapter_shape = self.replacements[name].shape
        elif "lora_A" not in parts or "lora_B" not in parts:
            raise BadConfig(f"{directory}: {name} has half an adapter: {sorted(parts)}")
        elif "transposed" in parts and "lora_magnitude_vector" in parts:
            raise BadConfig(
                f"{directory}: DoRA on the embedding {name} cannot be merged; leave it out of target_modules"
            )
        else:
            adapter_shape = (parts["lora_B"].shape[0], *parts["lora_A"].shape[1:])
            adapter_shape = adapter_shape[::-1] if "transposed" in parts else adapter_shape
        if adapter_shape != shape:
            raise BadConfig(
                f"{directory}: {name} is {list(shape)} in the base and {list(adapter_shape)} in the adapter"
            )
