"""Gemma 3n: several residual streams (AltUp), low-rank residuals (LAuReL), an embedding for each layer, sparse MLPs.

Its norms multiply by the stored weight, unlike those of the other Gemmas. AltUp multiplies the streams with one
another, which no rounding of matrices' inputs keeps within float16, and writes into `prediction_coefs.weight` in
place, which a 4-bit weight cannot bear. The vision tower (mobilenetv5_300m) exists only in timm, which needs
torchvision.
"""

from tasks.engine.models.families.gemma import GEMMA_TURNS
from tasks.engine.models.family import Family, TextModel

FAMILY = Family(
    name="Gemma 3n",
    model_types=("gemma3n", "gemma3n_text"),
    towers=("vision_tower", "audio_tower", "embed_vision", "embed_audio"),
    never_adapted=("altup",),
    never_4bit=(
        "lm_head",
        "correction_coefs",
        "prediction_coefs",
        "modality_router",
        "altup_projections",
        "altup_unembed_projections",
    ),
    text_model=TextModel(
        classes={"Gemma3nForConditionalGeneration": "Gemma3nForCausalLM"},
        key_mapping={r"^model\.language_model\.": "model."},
        ignored=(r"^model\.(vision|audio)_tower\.", r"^model\.embed_(vision|audio)\."),
    ),
    unbuildable_tower_elements=300_000_000,
    trains_in_float16=False,
    chat_template=GEMMA_TURNS,
    residual_streams="altup_num_inputs",
    per_layer_width="hidden_size_per_layer_input",
    gate_sparsity="activation_sparsity_pattern",
    gguf_architectures={"gemma3n_text": "gemma3n"},
    gguf_fixed_settings={"hidden_size_per_layer_input": 256, "laurel_rank": 64},
)
