"""A small model written as a GGUF file and read back, to be trained and saved as any other."""

from pathlib import Path

import numpy as np
import pytest
import torch

import shoestring
from shoestring.data import load_tokenizer
from shoestring.errors import CheckpointError, ConfigError
from shoestring.training.load import load_model

gguf = pytest.importorskip("gguf")

WIDTH, INNER, HEADS, LETTERS = 32, 64, 4, [*"abcdefghijklmnop", "ab", "<end>"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two Llama blocks with random float32 weights and a tokenizer of letters."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(LETTERS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(LETTERS)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(LETTERS) - 1)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(LETTERS), WIDTH), "output_norm": (WIDTH,)}
    for i in range(2):
        block = {
            "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH),
            "attn_output": (WIDTH, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_gate": (INNER, WIDTH),
            "ffn_down": (WIDTH, INNER), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_its_weights_are_read_in_float32(file: Path) -> None:
    model = load_model(file)
    written = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(file).tensors}
    assert torch.equal(model.get_input_embeddings().weight, written["token_embd.weight"])
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, written["blk.1.ffn_up.weight"])
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_it_trains_and_is_saved_as_any_other(file: Path, tmp_path: Path) -> None:
    model, tokenizer = shoestring.load(file)
    ids = torch.tensor([tokenizer("abcab").input_ids])
    assert ids.tolist() == [[16, 2, 16]]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.any()
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    again = load_model(saved)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_its_shape_alone_has_other_weights(file: Path) -> None:
    sketch, model = load_model(file, from_scratch=True), load_model(file)
    assert sketch.config.hidden_size == WIDTH
    assert [p.shape for p in sketch.parameters()] == [p.shape for p in model.parameters()]
    assert not torch.equal(
        sketch.get_input_embeddings().weight, model.get_input_embeddings().weight
    )


def test_what_is_no_such_file_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load_model(tmp_path / "absent.gguf")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(CheckpointError, match="does not begin as a GGUF file"):
        load_model(other)
    with pytest.raises(CheckpointError, match="does not begin as a GGUF file"):
        shoestring.load(other)
    content = file.read_bytes()
    for length in (10, 200, len(content) // 2):
        other.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_model(other)
    assert load_tokenizer(file) is not None
