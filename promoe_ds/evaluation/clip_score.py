"""How near images are to their prompts in CLIP's space (Hessel et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from promoe_ds.data.reading import reading
from promoe_ds.data.vae import fingerprint_of, without_tf32
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError, cause_of
from promoe_ds.evaluation.sources import FolderImages, NpzImages

CLIP_SCORE = "clip_score"


class ClipScorer:
    """A CLIP of transformers, with its own tokenizer and preprocessing."""

    def __init__(self, source: str, device: torch.device) -> None:
        """Load it on a device.

        Args:
            source: folder or hub id.
        Raises: ConfigError if transformers is missing; DataError if there is no CLIP.
        """
        try:
            from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
        except ImportError as error:
            raise ConfigError(
                f"--clip {source}: needs transformers ({cause_of(error)}):"
                " pip install 'promoe_ds[text]'"
            ) from None
        with reading(Path(source), "CLIP with tokenizer and preprocessor_config.json"):
            network, found = CLIPModel.from_pretrained(
                source, use_safetensors=True, output_loading_info=True
            )
            if missing := found["missing_keys"]:
                raise ValueError(f"its weights lack {len(missing)} parameters of a CLIPModel")
            self._tokenizer = AutoTokenizer.from_pretrained(source)
            # Pillow resizes as in CLIP's own code, torchvision nearly so.
            self._processor = AutoImageProcessor.from_pretrained(source, backend="pil")
        self._network = network.eval().to(device)
        self._device = device
        self.identity = {"name": source, "weights": fingerprint_of(network)}

    @torch.no_grad()
    @without_tf32()
    def __call__(self, images_NHWC: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Return 100 * max(cosine, 0) of each uint8 image and its prompt, (N,) float64; longer
        prompts are cut to what CLIP takes.

        Source: Hessel et al. (2021); differs: 100 instead of 2.5, as figures are usually given.
        """
        images = [np.broadcast_to(image, (*image.shape[:2], 3)) for image in images_NHWC]
        pixels = self._processor(images=images, return_tensors="pt")["pixel_values"]
        texts = self._tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        output = self._network(
            input_ids=texts["input_ids"].to(self._device),
            attention_mask=texts["attention_mask"].to(self._device),
            pixel_values=pixels.to(self._device),
        )
        cosines_N = (output.image_embeds.double() * output.text_embeds.double()).sum(dim=1)
        return 100 * cosines_N.clamp(min=0).cpu().numpy()


def clip_score(
    images: NpzImages | FolderImages,
    prompts: Sequence[str],
    scorer: ClipScorer,
    team: DistributedContext,
    *,
    batch_size: int,
) -> float:
    """Return the mean score of images and their prompts, each rank a share of the batches; all call
    this together.
    """
    scores_N = np.zeros(len(images))
    for first in range(0, len(images), batch_size)[team.rank :: team.world_size]:
        rows = range(first, min(first + batch_size, len(images)))
        scores_N[rows.start : rows.stop] = scorer(images.read(rows), prompts[first : rows.stop])
    return float(team.sum(scores_N).mean())
