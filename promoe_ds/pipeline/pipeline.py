"""Class-conditional sampling as a diffusers pipeline: the package's own sampler behind diffusers'
conventions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    SchedulerMixin,
)
from PIL import Image
from torch import Tensor

from promoe_ds.condition import ClassCondition, Condition
from promoe_ds.diffusion.guidance import choose_scale
from promoe_ds.diffusion.sampler import (
    SamplingPlan,
    image_generators,
    initial_noise,
    sample_latents,
)
from promoe_ds.errors import ConfigError
from promoe_ds.evaluation.images import as_picture, draws_pixels, to_uint8
from promoe_ds.logs import get_logger
from promoe_ds.pipeline.transformer import ProMoETransformer2DModel

_LOG = get_logger("pipeline")

#: Which solver of the package a scheduler stands for.
_SOLVERS = {FlowMatchEulerDiscreteScheduler: "euler", DDPMScheduler: "ddpm", DDIMScheduler: "ddim"}
_OUTPUT_TYPES = ("pil", "np", "latent")


class ProMoEPipeline(DiffusionPipeline):
    """Draws images of classes; image i is a function of (seed, i) alone, the same as
    `promoe_ds.cli.sample` draws.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012 (diffusers reads it)

    def __init__(
        self,
        transformer: ProMoETransformer2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            scheduler: its kind and settings choose the solver: FlowMatchEulerDiscrete, DDPM or
            DDIM.
            vae: decodes latents; needless for models of pixels.
        """
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image a label.

        Args:
            num_inference_steps, guidance_scale: the recipe's if left out; guidance as (Ho &
            Salimans, 2022), 1 is none.
            output_type: "pil", "np" (N, H, W, C in [0, 1]) or "latent" (N, Z, H, W, as the network
            sees them).
        Raises: ConfigError naming the argument that does not fit the model.
        """
        config = self.transformer.run_config
        if output_type not in _OUTPUT_TYPES:
            raise ConfigError(f"output_type={output_type!r} is none of {', '.join(_OUTPUT_TYPES)}")
        if output_type != "latent" and self.vae is None and not draws_pixels(config):
            raise ConfigError(
                f"output_type={output_type!r}: latents of {config.model.in_channels} channels need"
                " a vae: ProMoEPipeline.from_pretrained(folder,"
                ' vae=AutoencoderKL.from_pretrained(...)), or take output_type="latent"'
            )
        if (
            output_type != "latent"
            and self.vae is not None
            and (shift := self.vae.config.get("shift_factor"))
        ):
            raise ConfigError(
                f"vae: shifts its latents by shift_factor={shift}, this package only scales them:"
                " take one without"
            )
        wrong = [label for label in class_labels if not 0 <= label < config.model.num_classes]
        if wrong or not len(class_labels):
            raise ConfigError(
                f"class_labels={list(class_labels)}: this model knows the classes 0 ... "
                f"{config.model.num_classes - 1}"
            )
        shape, indices = (
            (config.model.in_channels, config.model.input_size, config.model.input_size),
            range(len(class_labels)),
        )
        condition = ClassCondition(
            torch.tensor(list(class_labels), device=self._execution_device), config.model.null_label
        )
        noise = initial_noise(shape, seed=seed, indices=indices).to(self._execution_device)
        latents = sample_latents(
            self._denoise,
            noise,
            condition,
            self._plan(num_inference_steps, guidance_scale),
            image_generators(seed=seed, indices=indices),
        )
        images = latents if output_type == "latent" else self._images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoise(self, latents_BZHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        return self.transformer(
            latents_BZHW.to(self.transformer.dtype), timestep_B, condition
        ).sample

    def _plan(self, steps: int | None, scale: float | None) -> SamplingPlan:
        config, kind = self.transformer.run_config, type(self.scheduler)
        if kind not in _SOLVERS:
            raise ConfigError(
                f"{kind.__name__}: this pipeline samples with"
                f" {', '.join(known.__name__ for known in _SOLVERS)}"
            )
        steps = config.sampling.steps if steps is None else steps
        if problem := config.diffusion.sampling_problem(solver=_SOLVERS[kind], steps=steps):
            raise ConfigError(f"num_inference_steps or scheduler: {problem}")
        scale, why = choose_scale(config, scale, "guidance_scale")
        if why:
            _LOG.warning("%s", why)
        return SamplingPlan.of(
            config,
            steps=steps,
            cfg_scale=scale,
            solver=_SOLVERS[kind],
            shift=self.scheduler.config.get("shift", 1.0),
            num_train_timesteps=self.scheduler.config.num_train_timesteps,
        )

    def _images(self, latents_BZHW: Tensor, output_type: str) -> list[Image.Image] | np.ndarray:
        values = latents_BZHW / self.transformer.run_config.data.latent_scale
        if self.vae is not None:
            values = self.vae.decode(values.to(self.vae.dtype)).sample
        pixels = to_uint8(values.float().cpu().numpy())
        if output_type == "np":
            return pixels.astype(np.float32) / 255
        return [as_picture(image) for image in pixels]
