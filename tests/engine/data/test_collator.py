import pytest
import torch

from tasks.core.errors import BadConfig
from tasks.core.memory_fallback import micro_batch
from tasks.core.refs import ModelDir
from tasks.engine.data.chat_template import IGNORE, Example
from tasks.engine.data.collator import collate
from tasks.engine.losses.chunked import cross_entropy
from tasks.engine.models.lm_head import check_head, head_of, hidden_states
from tasks.engine.models.load import load_model
from tests.pico import pico_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = pico_model(tmp_path_factory.mktemp("model"), sliding_window=16, final_logit_softcapping=4.0)
    return load_model(ModelDir(directory), "float32", "cpu").train()


def example(prompt: int, answer: int, seed: int) -> Example:
    ids = torch.randint(5, 390, (prompt + answer,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(ids, [IGNORE] * prompt + ids[prompt:])


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_padded_rows_give_the_loss_and_gradients_of_the_model_itself_row_by_row(model):
    rows = [example(5, 3, 0), example(40, 7, 1), example(11, 1, 2)]
    batch = collate(list(enumerate(rows)), multiple=8)
    assert batch["input_ids"].shape == (3, 48) and batch["tokens"] == 67
    hidden = hidden_states(model, batch)
    batched = cross_entropy(hidden, head_of(model), batch["labels"], chunk_bytes=1)
    got = gradients(model, batched)
    single = sum(
        model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss * len(row.answer_ids)
        for row in rows
    )
    torch.testing.assert_close(batched, single, rtol=1e-5, atol=1e-5)
    for name, want in gradients(model, single).items():
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-5, msg=name)


def test_a_head_that_scales_its_logits_is_refused(model, monkeypatch):
    check_head(model)
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(model, "forward", scaled)
    with pytest.raises(BadConfig, match="scales its logits"):
        check_head(model)


def test_memory_fallback_levels_keep_the_effective_batch():
    assert [micro_batch(32, max(1, 8 >> level)) for level in range(5)] == [8, 4, 2, 1, 1]
    assert micro_batch(30, 8) == 6
    assert micro_batch(4, 64) == 4
