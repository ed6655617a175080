"""`Family`: everything that is special to a family of models. torch is not imported, so that config checks may use it.

A fact that a model's own config.json states (a window, a softcap's value) is read from there; a family names the
setting. The defaults are those of a plain decoder: pre-norm blocks whose norms multiply by the stored weight.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Norms behind attention and MLP: what a block adds to the residual stream has passed one (Gemma 2 and later).
SANDWICH_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
# The last projection of attention and of the MLP writes into the residual stream itself.
PRE_NORM_WRITERS = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")
SANDWICH_WRITERS = tuple(f"{norm}.weight" for norm in SANDWICH_NORMS)
# Attribute of transformers' embedding modules that multiply rows by a constant (Gemma: sqrt(hidden)).
EMBEDDING_SCALE = "scalar_embed_scale"
# Vision and audio modules under the names that transformers gives them.
TOWERS = ("vision_tower", "audio_tower", "multi_modal_projector", "embed_vision", "embed_audio")


class ChatTemplate(NamedTuple):
    """A chat template in Jinja that a tokenizer without one can be given, by the name that `chat_template` sets.

    `token` has to be in the tokenizer's vocabulary.
    """

    name: str
    token: str
    jinja: str


class TextModel(NamedTuple):
    """The text half of a multimodal checkpoint, for families whose towers need libraries beyond transformers.

    `classes` maps the checkpoint's class to that of its text half, both by name in transformers; `key_mapping` renames
    its tensors (regular expression: replacement); `ignored` are patterns of the towers' tensors.
    """

    classes: Mapping[str, str]
    key_mapping: Mapping[str, str]
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """What differs between families of models; one instance a family, in a file of its own."""

    name: str
    """In messages and tests."""

    model_types: tuple[str, ...]
    """The `model_type`s of config.json, of whole models and of their text halves."""

    norms_are_gain_minus_1: bool = False
    """Norms compute `x * (1 + w)` instead of `x * w`."""

    plain_norms: str = r"(vision|audio)_(tower|model)|\bvisual\."
    """Pattern of norms that multiply by `w` all the same: a tower's, or a gated one."""

    residual_writers: tuple[str, ...] = ()
    """Endings of the tensors of a layer that scale what it adds to the residual stream; empty: not known, so the
    stream is not rescaled."""

    norm_readers: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    )
    """Norms of a layer and the linear layers that read them: what AWQ scales together."""

    towers: tuple[str, ...] = TOWERS
    """Modules of vision and audio: neither trained nor quantized."""

    never_adapted: tuple[str, ...] = ()
    """Modules beside the towers that get no adapter."""

    never_4bit: tuple[str, ...] = ("lm_head",)
    """Modules beside the towers that stay in 16 bits; leaves, since a parent's name does not protect its children
    (unsloth#3650)."""

    text_model: TextModel | None = None
    """The text half, where a checkpoint's towers may not be buildable here."""

    unbuildable_tower_elements: int = 0
    """Elements of the tower that transformers builds only with a further library."""

    trains_in_float16: bool = True
    """The residual stream enters no matrix unnormed, so that float16 can hold what is multiplied."""

    score_softcap: str = "attn_logit_softcapping"
    """Setting of the cap on attention scores."""

    logit_softcap: str = "final_logit_softcapping"
    """Setting of the cap on logits."""

    softcapped_attention: str = "eager"
    """transformers' attention implementation that applies the cap on scores."""

    chat_template: ChatTemplate | None = None
    """The family's own turns, for a base model whose tokenizer has no chat template."""

    residual_streams: str | None = None
    """Setting of the number of residual streams that run side by side; None: one stream."""

    per_layer_width: str | None = None
    """Setting of the width of the embedding that each layer gets beside the stream; None: no such embedding."""

    gate_sparsity: str | None = None
    """Setting of the list, by layer, of the fraction of MLP gates that are set to zero; None: no such layers."""

    handwritten_layers: bool = False
    """tasks.engine.speed.gemma3 can run the decoder's layers where all of their weights are trained."""

    trimmable_vocabulary: tuple[str, ...] = ()
    """Model types of which only embedding and LM head have a row a token (no table of per-layer embeddings), and whose
    configs name no ids of images or sounds."""

    gguf_architectures: Mapping[str, str] = field(default_factory=dict)
    """llama.cpp's name of the architecture by model type, where it is another one."""

    gguf_quantizes_every_matrix: bool = False
    """llama.cpp's quantizer leaves no matrix of the layers in 16 or 32 bits."""

    gguf_global_layer_period: int | None = None
    """llama.cpp takes every n-th layer as one with full attention, whatever config.json says."""

    gguf_fixed_settings: Mapping[str, int] = field(default_factory=dict)
    """Settings of config.json whose value is written into llama.cpp's code."""

    def gain_offset(self, norm: str) -> float:
        """What is added to the stored weight of the norm named `norm` before it multiplies: 1 or 0."""
        return float(self.norms_are_gain_minus_1 and re.search(self.plain_norms, norm) is None)

    def is_tower(self, name: str) -> bool:
        """Whether a module or tensor belongs to vision or audio."""
        return any(tower in name for tower in self.towers)

    def is_never_4bit(self, name: str) -> bool:
        """Whether a module must not be stored in 4 bits."""
        return any(part in name for part in (*self.never_4bit, *self.towers))

    def streams(self, config: Any) -> int:
        """The number of residual streams of a text model's config."""
        return int(getattr(config, self.residual_streams, 1)) if self.residual_streams else 1

    def per_layer(self, config: Any) -> int:
        """The width of the embeddings that a text model gives each layer; 0 where there are none."""
        return int(getattr(config, self.per_layer_width, 0) or 0) if self.per_layer_width else 0

    def sparse_layers(self, config: Any) -> int:
        """How many layers of a text model set a fraction of their MLP gates to zero."""
        fractions = getattr(config, self.gate_sparsity, None) if self.gate_sparsity else None
        return sum(fraction > 0 for fraction in fractions or ())

    def unlike_llama_cpp(self, config: Any) -> list[str]:
        """Sentences on settings of a text model that llama.cpp does not read: its GGUF would compute something else."""
        sentences = [
            f"{name}={getattr(config, name, None)}, which llama.cpp takes as {value}"
            for name, value in self.gguf_fixed_settings.items()
            if getattr(config, name, value) != value
        ]
        period, kinds = self.gguf_global_layer_period, getattr(config, "layer_types", None) or []
        if period:
            expected = [(index + 1) % period == 0 for index in range(len(kinds))]
            if [kind == "full_attention" for kind in kinds] != expected:
                ordinal = {2: "2nd", 3: "3rd"}.get(period, f"{period}th")
                sentences.append(f"layer_types, of which llama.cpp takes every {ordinal} as full_attention")
        return sentences


GENERIC = Family(name="generic", model_types=())
"""What is assumed of a model type that no family lists."""
