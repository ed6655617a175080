from pathlib import Path

from transformers import Gemma3TextConfig

from tasks.gguf.run import _unread_settings


def test_a_setting_that_llama_cpp_does_not_read_is_a_warning(tmp_path: Path) -> None:
    Gemma3TextConfig(num_hidden_layers=7).save_pretrained(tmp_path)
    assert _unread_settings(tmp_path) == []
    Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]).save_pretrained(tmp_path)
    assert _unread_settings(tmp_path) == [
        "llama.cpp computes another model than config.json describes: layer_types, of which llama.cpp takes every 6th "
        "as full_attention"
    ]
