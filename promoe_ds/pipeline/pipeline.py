"""Sampling as a diffusers pipeline: the package's own sampler behind diffusers' conventions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from PIL import Image
from torch import Tensor

from promoe_ds.condition import ClassCondition, Condition, TextCondition
from promoe_ds.data.normalization.values import LatentNormalization
from promoe_ds.data.text_encoder import TextEncoder
from promoe_ds.data.vae import decode_latents, identify
from promoe_ds.diffusion.guidance import check_guided
from promoe_ds.diffusion.sampler import (
    SamplingPlan,
    build_scheduler,
    image_generators,
    initial_noise,
    sample_latents,
)
from promoe_ds.errors import ConfigError
from promoe_ds.evaluation.grids import as_picture
from promoe_ds.evaluation.images import draws_pixels, to_uint8
from promoe_ds.evaluation.sample_request import check_prompts
from promoe_ds.evaluation.sampling import plan_sampling
from promoe_ds.pipeline.transformer import ProMoETransformer2DModel

#: Which solver of the package a scheduler stands for.
_SOLVERS = {FlowMatchEulerDiscreteScheduler: "euler", DDPMScheduler: "ddpm", DDIMScheduler: "ddim"}
#: What a plan's fields are called here.
_NAMES = {
    "steps": "num_inference_steps",
    "solver": "scheduler",
    "cfg_scale": "guidance_scale",
    "cfg_interval": "guidance_interval",
}
_OUTPUT_TYPES = ("pil", "np", "latent")


class ProMoEPipeline(DiffusionPipeline):
    """Draws images of classes or prompts; image i is a function of (seed, i) and of its class or
    prompt alone, the same as `promoe_ds.cli.sample` draws.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "tokenizer", "text_encoder"]  # noqa: RUF012 (diffusers reads it)

    def __init__(
        self,
        transformer: ProMoETransformer2DModel,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
    ) -> None:
        """Put the parts together.

        Args:
            transformer: the network.
            scheduler: its kind and settings choose the solver: FlowMatchEulerDiscrete, DDPM or
                DDIM.
            vae: an autoencoder that decodes latents; needless for models of pixels.
            tokenizer: of transformers, what a model of texts was trained with.
            text_encoder: the same.
        """
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **options: Any
    ) -> ProMoEPipeline:
        """Load a pipeline.

        Args:
            pretrained_model_name_or_path: a pipeline's folder or hub id, as diffusers takes it; or
            a single export, a run directory (its newest checkpoint) or a checkpoint, of which the
            first average of the weights is taken, else the weights.
            options: diffusers' own; of an export, run or checkpoint `torch_dtype`, and the parts
            `scheduler`, `vae`, `tokenizer`, `text_encoder` where they are needed.
        Raises: CheckpointError naming what is missing or damaged.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir() or (folder / "model_index.json").is_file():
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        transformer = ProMoETransformer2DModel.from_export(folder, options.pop("torch_dtype", None))
        scheduler = options.pop("scheduler", None) or build_scheduler(transformer.run_config)
        return cls(transformer, scheduler, **options)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_interval: Sequence[float] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image a label or prompt.

        Args:
            class_labels: what to draw, by a model of classes.
            num_inference_steps: of the solver; the recipe's if left out.
            guidance_scale: as (Ho & Salimans, 2022), 1 is none; the recipe's if left out.
            seed: image i is a function of (seed, i) and its label or prompt.
            output_type: "pil", "np" (N, H, W, C in [0, 1]) or "latent" (N, Z, H, W, as the network
                sees them).
            return_dict: an `ImagePipelineOutput`, or a tuple of the images.
            prompt: what to draw, by a model of texts; a blank one is the null condition.
            negative_prompt: what guidance leads away from, one for all or one a prompt; the null
                condition if left out.
            guidance_interval: noise levels between which there is guidance, e.g. (0.2, 0.8).
            generator: gives the seed in place of `seed`; or one an image, each for its own.
        Raises: ConfigError naming the argument that does not fit the model.
        """
        self._check_output(output_type)
        plan = self._plan(num_inference_steps, guidance_scale, guidance_interval)
        check_guided(plan.cfg_scale, "negative_prompt", negative_prompt)
        condition, negative = self._conditions(class_labels, prompt, negative_prompt)
        model, device = self.transformer.run_config.model, self._execution_device
        shape = model.in_channels, *model.latent_size
        draws = _draws(len(condition), seed, generator)
        noise = [initial_noise(shape, seed=own, indices=indices) for own, indices in draws]
        added = [image_generators(seed=own, indices=indices) for own, indices in draws]
        # Hooks that bring the network to the device do so when it is called.
        is_offloaded = hasattr(self.transformer, "_hf_hook")
        latents = sample_latents(
            self._denoise,
            torch.cat(noise).to(device),
            condition.counted().to(device),
            plan,
            list(chain.from_iterable(added)),
            negative=negative and negative.counted().to(device),
            prepare=None if is_offloaded else self.transformer.denoiser.prepare,
        )
        images = latents if output_type == "latent" else self._images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def encode_prompt(self, prompts: str | Sequence[str]) -> TextCondition:
        """Return one prompt or several as the network takes them, on the host; blank ones are null.

        Raises: ConfigError if the pipeline has no text encoder, or one of other widths.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ConfigError(
                "prompt: this pipeline has no text_encoder and tokenizer: give both to"
                " ProMoEPipeline.from_pretrained, or export it with --text-encoder"
            )
        config = self.transformer.run_config
        encoder = TextEncoder(
            "text_encoder",
            device=self._execution_device,
            max_length=config.model.text_length,
            parts=(self.text_encoder, self.tokenizer),
        )
        encoder.identity.check("prompt", config)
        return encoder.condition([prompts] if isinstance(prompts, str) else prompts)

    def _check_output(self, output_type: str) -> None:
        config = self.transformer.run_config
        if output_type not in _OUTPUT_TYPES:
            raise ConfigError(f"output_type={output_type!r} is none of {', '.join(_OUTPUT_TYPES)}")
        if output_type == "latent":
            return
        if self.vae is None and not draws_pixels(config):
            raise ConfigError(
                f"output_type={output_type!r}: latents of {config.model.in_channels} channels need"
                " a vae: ProMoEPipeline.from_pretrained(folder,"
                ' vae=AutoModel.from_pretrained(...)), or take output_type="latent"'
            )
        if self.vae is not None and (misfit := identify(self.vae, "vae").misfit(config)):
            raise ConfigError(f"vae: has {misfit}: take the one that the latents come from")

    def _conditions(
        self,
        class_labels: Sequence[int] | None,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
    ) -> tuple[Condition, Condition | None]:
        """Return what to draw, and what to lead it away from."""
        model = self.transformer.run_config.model
        if model.condition == "text":
            if class_labels is not None or prompt is None:
                raise ConfigError("class_labels: this model is conditioned on text: give a prompt=")
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            return self._texts(prompts, negative_prompt)
        if prompt is not None or negative_prompt is not None:
            raise ConfigError("prompt: this model is conditioned on classes: give class_labels=")
        labels = [] if class_labels is None else [int(label) for label in class_labels]
        if not labels or not all(0 <= label < model.num_classes for label in labels):
            raise ConfigError(
                f"class_labels={labels}: this model knows the classes 0 ... {model.num_classes - 1}"
            )
        return ClassCondition(torch.tensor(labels), model.null_label), None

    def _texts(
        self, prompts: list[str], negative_prompt: str | Sequence[str] | None
    ) -> tuple[Condition, Condition | None]:
        check_prompts(prompts, "prompt")
        if negative_prompt is None:
            return self.encode_prompt(prompts), None
        negative = (
            [negative_prompt] * len(prompts)
            if isinstance(negative_prompt, str)
            else list(negative_prompt)
        )
        if len(negative) != len(prompts):
            raise ConfigError(
                f"negative_prompt: {len(negative)} for {len(prompts)} prompts: give one for all or"
                " one for each"
            )
        check_prompts(negative, "negative_prompt")
        return self.encode_prompt(prompts), self.encode_prompt(negative)

    def _denoise(self, latents_BZHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        return self.transformer(
            latents_BZHW.to(self.transformer.dtype), timestep_B, condition
        ).sample

    def _plan(
        self,
        steps: int | None,
        scale: float | None,
        interval: Sequence[float] | None = None,
    ) -> SamplingPlan:
        config, kind = self.transformer.run_config, type(self.scheduler)
        if kind not in _SOLVERS:
            raise ConfigError(
                f"{kind.__name__}: this pipeline samples with"
                f" {', '.join(known.__name__ for known in _SOLVERS)}"
            )
        return plan_sampling(
            config,
            lambda field: _NAMES[field],
            steps=steps,
            solver=_SOLVERS[kind],
            cfg_scale=scale,
            cfg_interval=interval,
            shift=self.scheduler.config.get("shift", 1.0),
            num_train_timesteps=self.scheduler.config.num_train_timesteps,
        )

    def _images(self, latents_BZHW: Tensor, output_type: str) -> list[Image.Image] | np.ndarray:
        config = self.transformer.run_config
        values = LatentNormalization.of(config.data).denormalize(latents_BZHW)
        if self.vae is not None:
            values = decode_latents(self.vae, values.to(self.vae.dtype))
        pixels = to_uint8(values.float().cpu().numpy())
        if output_type == "np":
            return pixels.astype(np.float32) / 255
        return [as_picture(image) for image in pixels]


Pipeline = ProMoEPipeline
"""`ProMoEPipeline` by its short name."""


def _draws(
    count: int, seed: int, generator: torch.Generator | Sequence[torch.Generator] | None
) -> list[tuple[int, range]]:
    """Return seeds, each with the indices of its images."""
    if generator is None:
        return [(seed, range(count))]
    if isinstance(generator, torch.Generator):
        return [(_seed_of(generator), range(count))]
    if len(generator) != count:
        raise ConfigError(
            f"generator: {len(generator)} for {count} images: give one for all or one for each"
        )
    return [(_seed_of(each), range(1)) for each in generator]


def _seed_of(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))
