"""Text encoders of each family: what transformers computes, ragged, whatever else is encoded."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from promoe_ds.data.text_encoder import PACKAGED, TextEncoder
from promoe_ds.errors import DataError

from .text_encoders import FAMILIES, LONGEST, WIDTH, save_encoder

TEXTS = ["a red apple", "purple heart", "", "a heart of gold", " \t", "apple"]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoder_encodes_as_its_model_does_alone(tmp_path: Path, family: str) -> None:
    folder = save_encoder(tmp_path / family, family)
    encoder = TextEncoder(str(folder))
    assert encoder.identity.width == encoder.identity.pooled_width == WIDTH
    encoded = encoder.encode(TEXTS)
    network = encoder._network
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for place, text in enumerate(TEXTS):
        ids = tokenizer(text.strip(), return_tensors="pt")["input_ids"]
        ids = ids if ids.numel() else torch.tensor([[2]])
        output = network(input_ids=ids.long())
        alone = output.last_hidden_state[0]
        torch.testing.assert_close(
            encoded.states[place].float(), alone.bfloat16().float(), atol=1e-2, rtol=1e-2
        )
        pooled = output.pooler_output[0] if "clip" in family else alone.mean(0)
        torch.testing.assert_close(encoded.pooled[place], pooled)
    assert encoded.truncated == 0 and encoded.states[0].dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["clip_text", "qwen"])
def test_text_condition_is_padded_masked_and_null_where_blank(tmp_path: Path, family: str) -> None:
    encoder = TextEncoder(str(save_encoder(tmp_path, family)))
    condition = encoder.condition(TEXTS)
    assert condition.is_null_B.tolist() == [False, False, True, False, True, False]
    for place, states in enumerate(encoder.encode(TEXTS).states):
        assert int(condition.mask_BL[place].sum()) == len(states) > 0
        assert torch.equal(condition.tokens_BLC[place, : len(states)], states)
        assert not condition.tokens_BLC[place, len(states) :].any()
    dropped = condition.drop(torch.ones(len(TEXTS), dtype=torch.bool))
    assert torch.equal(dropped.pooled_BC[0], condition.pooled_BC[2])
    assert torch.equal(dropped.tokens_BLC[0], condition.tokens_BLC[2])


def test_empty_text_of_a_decoder_is_its_end_though_that_is_token_0(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, "qwen")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.eos_token = None, "<pad>"
    tokenizer.save_pretrained(folder)
    encoder = TextEncoder(str(folder))
    alone = encoder._network(input_ids=torch.tensor([[0]])).last_hidden_state[0]
    torch.testing.assert_close(encoder.empty.pooled_C, alone.mean(0))


def test_text_longer_than_the_encoder_takes_is_cut_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(save_encoder(tmp_path, "bert"))
    exact, long = "a " * (LONGEST - 2), "a " * (LONGEST - 1)
    encoded = TextEncoder(folder).encode([exact, long, "a"])
    assert encoded.truncated == 1 and [len(each) for each in encoded.states] == [8, 8, 3]
    shorter = TextEncoder(folder, max_length=4)
    with caplog.at_level(logging.WARNING):
        assert shorter.condition([exact, long, "a"]).tokens_BLC.shape[1] == 4
    assert "2 of 3 texts are longer than the 4 tokens" in caplog.text
    with pytest.raises(DataError, match="takes 8 tokens, not 9"):
        TextEncoder(folder, max_length=9)


def test_text_encoder_fingerprint_is_of_its_weights_not_of_its_name(tmp_path: Path) -> None:
    first, other = (save_encoder(tmp_path / str(seed), "t5", seed) for seed in (0, 1))
    copy = shutil.copytree(first, tmp_path / "copy")
    identities = [TextEncoder(str(folder)).identity for folder in (first, copy, other)]
    assert replace(identities[1], name=str(first)) == identities[0]
    assert identities[2].fingerprint != identities[0].fingerprint
    assert identities[0].is_called(identities[1].fingerprint)


def test_text_encoder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing-there: no such folder, .* all-minilm-l6-v2"):
        TextEncoder("nothing-there")
    with pytest.raises(DataError, match="not a readable text encoder in safetensors"):
        TextEncoder(str(tmp_path))
    weights = save_encoder(tmp_path / "cut", "bert") / "model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if "layer.1" not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lack \d+ parameters of a BertModel, encoder\.layer\.1"):
        TextEncoder(str(tmp_path / "cut"))


def test_packaged_encoder_knows_what_words_mean() -> None:
    (name,) = PACKAGED
    encoder = TextEncoder(name)
    assert (encoder.identity.width, encoder.identity.max_length) == (384, 512)
    pooled = torch.nn.functional.normalize(
        encoder.encode(["red apple", "green apple", "flag: Bangladesh"]).pooled
    )
    close, far = pooled[0] @ pooled[1], pooled[0] @ pooled[2]
    assert close > 0.6 > 0.3 > far
