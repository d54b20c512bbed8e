"""Draw a model's classes with its diffusers pipeline, and keep it in diffusers' own format.

    python examples/sample_with_diffusers.py exports/digits drawn

The first argument is an export, a run directory or a pipeline's folder. A model of latents needs an
autoencoder: `Pipeline.from_pretrained(folder, vae=AutoencoderKL.from_pretrained(...))`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

import promoe_ds


def draw(model: Path, out: Path, *, steps: int = 30, each: int = 8) -> Path:
    """Write grid.png, a row a class, and `pipeline/`, which `from_pretrained` takes as well."""
    pipeline = promoe_ds.Pipeline.from_pretrained(model)
    classes = range(pipeline.transformer.run_config.model.num_classes)
    labels = [label for label in classes for _ in range(each)]
    # Image i is a function of (seed, i) and of its class, as promoe-sample draws it.
    images = pipeline(labels, num_inference_steps=steps, guidance_scale=1.5, seed=0).images
    width, height = images[0].size
    grid = Image.new(images[0].mode, (each * width, len(classes) * height))
    for place, image in enumerate(images):
        grid.paste(image, (place % each * width, place // each * height))
    pipeline.save_pretrained(out / "pipeline")
    grid.resize((4 * grid.width, 4 * grid.height), Image.Resampling.NEAREST).save(out / "grid.png")
    return out / "grid.png"


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
