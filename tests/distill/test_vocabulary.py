"""A smaller vocabulary: text of its pieces is tokenized as before by every reader; later stages need no setting."""

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from tasks.core.command import Report
from tasks.core.errors import BadConfig, GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.distill import DistillConfig
from tasks.distill.run import distil
from tasks.distill.vocabulary import Pieces, choose_pieces
from tasks.distill.vocabulary_files import trimmed_model
from tasks.distill.vocabulary_trim import PROBE, TrimmedVocabulary, trim
from tasks.engine.data.chat_template import Example
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.losses.loss_mix import Head
from tasks.engine.models.load import load_model
from tasks.engine.runtimes.llama_logits import LlamaInput, llama_logits
from tasks.gguf import GgufConfig
from tasks.gguf.run import convert
from tasks.merge import MergeConfig
from tasks.merge.run import merge
from tests.engine.rows import example_dataset, example_rows
from tests.rows import write_rows

STUDENT = ModelDir(Path(__file__).parents[2] / "deployments" / "quickstart" / "student")  # 2 048 pieces
TEXTS = ["Measure pump 7 again.", "the seal of mixer M-3 leaks oil", '{"intent": "x"}', "a", " ", "\n\n", PROBE]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = example_dataset(tmp_path_factory.mktemp("dataset"), train=24, validation=6)
    write_rows(directory / "test.jsonl", example_rows(4, start=40))
    return directory


def trimmed(
    dataset: Path, work: Path, size: int = 700, texts: Path | None = None, student: ModelDir = STUDENT
) -> tuple[TrimmedVocabulary, Report]:
    report = Report()
    config = DistillConfig(vocabulary=size)
    result = trim(config, student, load_tokenizer(STUDENT), dataset, texts, report, Job(work))
    assert result is not None
    return result, report


def test_text_of_remaining_pieces_is_tokenized_as_before():
    """For random sets of pieces, each closed under its merges: SentencePiece with them agrees with all pieces."""
    pieces = Pieces(STUDENT.base / "tokenizer.model")
    complete = sentencepiece.SentencePieceProcessor(model_proto=pieces.proto.SerializeToString())
    words = [piece.replace("▁", " ") for piece in pieces.text if piece.startswith("▁") and len(piece) > 3]
    chosen = random.Random(0)
    compared = 0
    for _ in range(5):
        piece_ids = choose_pieces(
            pieces, chosen.sample(pieces.normal, 300), chosen.sample(pieces.normal, 400), 1100, 2048
        )
        reduced = sentencepiece.SentencePieceProcessor(model_proto=trimmed_model(pieces, piece_ids))
        assert reduced.vocab_size() == len(piece_ids) == 1100
        for _ in range(200):
            text = "".join(chosen.choices(words, k=2)).strip()
            split = complete.encode(text, out_type=int)
            assert reduced.decode(reduced.encode(text)) == text
            if set(split) <= set(piece_ids):
                assert [piece_ids[index] for index in reduced.encode(text, out_type=int)] == split
                compared += 1
    assert compared > 100


def test_every_file_has_the_new_ids_and_the_weights_their_rows(dataset, tmp_path):
    result, report = trimmed(dataset, tmp_path)
    piece_ids, directory = result.piece_ids, result.student.base
    assert len(piece_ids) == 700 and report.details["vocabulary"]["used_by_data"] < 200
    old, new = load_tokenizer(STUDENT), load_tokenizer(result.student)
    assert new.convert_ids_to_tokens(list(range(700))) == old.convert_ids_to_tokens(piece_ids)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert [processor.id_to_piece(i) for i in range(700)] == old.convert_ids_to_tokens(piece_ids)
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (STUDENT.base, directory))
        assert [piece_ids[i] for i in after["eos_token_id"]] == before["eos_token_id"] and after["bos_token_id"] == 2
    before, after = (load_file(folder / "model.safetensors") for folder in (STUDENT.base, directory))
    table = "model.embed_tokens.weight"
    assert torch.equal(after.pop(table), before.pop(table)[piece_ids])
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    load_model(result.student, "float32", "cpu")
    for text in TEXTS:
        ids = new(text, add_special_tokens=False)["input_ids"]
        assert new.decode(ids) == text and processor.encode(text) == ids


def test_texts_rank_the_pieces_that_the_data_do_not_use(dataset, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("supervisor calibration\n" * 3 + "thermostat\n", encoding="utf-8")
    plain, _ = trimmed(dataset, tmp_path / "plain", 600)
    ranked, report = trimmed(dataset, tmp_path / "ranked", 600, texts)
    words = load_tokenizer(STUDENT)("supervisor calibration", add_special_tokens=False)["input_ids"]
    assert set(words) <= set(ranked.piece_ids) and not set(words) <= set(plain.piece_ids)
    assert report.details["vocabulary"]["texts_covered"] == 1


def test_the_teacher_is_restricted_and_renormalised_exactly():
    torch.manual_seed(0)
    head, hidden = Head(torch.randn(50, 8), 5.0), torch.randn(4, 8)
    piece_ids = sorted(random.Random(0).sample(range(50), 20))
    result = TrimmedVocabulary(STUDENT, piece_ids)
    complete = head.logits(hidden).softmax(-1)[:, piece_ids]
    assert torch.allclose(
        result.head(head).logits(hidden).softmax(-1), complete / complete.sum(-1, keepdim=True), atol=1e-6
    )
    example = Example([piece_ids[3], piece_ids[0], piece_ids[7]], [-100, piece_ids[0], piece_ids[7]])
    assert result.examples([example]) == [Example([3, 0, 7], [-100, 0, 7])]


def test_later_stages_need_no_setting(dataset, tmp_path):
    """Distilled by itself untrimmed a student has nothing to learn; then merge, GGUF, llama.cpp."""
    out, merged, file = (tmp_path / name for name in ("student", "merged", "gguf"))
    for directory in (out, merged, file):
        directory.mkdir()
    config = DistillConfig(
        vocabulary=640, learning_rate=1e-9, max_steps=1, batch_size=8, kd_weight=1, ce_weight=0, precision="float32"
    )
    report = distil(config, STUDENT, STUDENT, dataset, out, Job(tmp_path / "work"))
    assert abs(report.metrics["validation_kd_loss"]) < 1e-4 < report.metrics["validation_ce_loss"]
    assert load_file(out / "model.safetensors")["model.embed_tokens.weight"].shape == (640, 160)
    merge(MergeConfig(), ModelDir(out), dataset, merged, Job(tmp_path / "merge.work"))
    gguf_config = GgufConfig(kind="Q8_0", proof_rows=4)
    proven = convert(gguf_config, ModelDir(merged), file, Job(tmp_path / "gguf.work"), dataset)
    assert proven.metrics["top1"] > 0.9
    tokenizer = load_tokenizer(ModelDir(merged))
    inputs = [LlamaInput(text, [2, 5], 1) for text in TEXTS]
    for text, output in zip(TEXTS, llama_logits(file / "model.gguf", inputs, tmp_path / "llama.log"), strict=True):
        assert output.ids == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_unsuitable_students_and_sizes_are_refused(dataset, tmp_path):
    with pytest.raises(BadConfig, match=r"vocabulary=350: the data, bytes.*take \d{3} pieces; raise it"):
        trimmed(dataset, tmp_path / "small", 350)
    with pytest.raises(BadConfig, match="no less than the tokenizer's 2048 pieces"):
        trimmed(dataset, tmp_path / "large", 2048)
    with pytest.raises(BadConfig, match="only SentencePiece tokenizers"):
        Pieces(tmp_path / "tokenizer.model")
    other = ModelDir(Path(shutil.copytree(STUDENT.base, tmp_path / "other")))
    settings = json.loads((other.base / "config.json").read_text()) | {"model_type": "gemma3n_text"}
    (other.base / "config.json").write_text(json.dumps(settings))
    with pytest.raises(BadConfig, match="carries an adapter: merge it"):
        trimmed(dataset, tmp_path / "adapter.work", 700, student=ModelDir(STUDENT.base, tmp_path))
    with pytest.raises(BadConfig, match="not for gemma3n_text"):
        trimmed(dataset, tmp_path / "other.work", 700, student=other)


def test_pieces_that_miss_their_merges_are_noticed(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Pieces, "merge_path", lambda self, index: {index})
    with pytest.raises(GateFailed, match=r"row 1 of train.jsonl.*is tokenized differently by the trimmed tokenizer"):
        trimmed(dataset, tmp_path)
