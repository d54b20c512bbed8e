"""The diffusers pipeline of texts: the command's images, its parts through their folders, and
fine-tuning with all losses or a few weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from promoe_ds import ProMoEPipeline, ProMoETransformer2DModel
from promoe_ds.checkpoint.conversion import Request, convert
from promoe_ds.diffusion import DiffusionBatch
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.evaluation.sample_job import draw_samples
from promoe_ds.evaluation.sample_request import SampleRequest
from promoe_ds.training.step import TrainingModule

from ..builders import condition_of, random_network, random_tensor
from ..data.text_encoders import save_encoder
from .made import make_export, text_sections

APPLE, HEART = "a red apple", "purple heart"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return an export of a text model, and a pipeline of it."""
    folder = tmp_path_factory.mktemp("text")
    export = make_export(folder, sampling={"cfg_scale": 2.0, "steps": 3}, **text_sections(folder))
    to_pipeline(export, folder / "pipeline", text_encoder=str(folder / "encoder"))
    return export, folder / "pipeline"


def to_pipeline(export: Path, folder: Path, **request: Any) -> None:
    convert(export, Request(destination=folder, to="diffusers", **request))


def draw(pipeline: ProMoEPipeline, prompt: str | list[str], **values: Any) -> np.ndarray:
    return pipeline(prompt=prompt, output_type="np", **values).images


def test_pipeline_draws_what_the_command_draws_also_when_saved_again(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    export, folder = folders
    given = {"negative_prompt": "gold", "seed": 5}
    draw_samples(
        SampleRequest(
            model=export,
            out=tmp_path / "out",
            prompts=(APPLE, HEART, " "),
            cfg_interval=(0.5, 1.0),
            **given,
        )
    )
    with np.load(tmp_path / "out" / "samples.npz") as data:
        drawn = data["arr_0"]
    pipeline = ProMoEPipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "again")
    for each in (pipeline, ProMoEPipeline.from_pretrained(tmp_path / "again")):
        images = draw(each, [APPLE, HEART, " "], guidance_interval=(0.5, 1.0), **given)
        assert np.array_equal((images * 255).round().astype("uint8"), drawn)


def test_one_prompt_is_encoded_as_one(folders: tuple[Path, Path]) -> None:
    pipeline = ProMoEPipeline.from_pretrained(folders[1])
    one, listed = pipeline.encode_prompt(APPLE), pipeline.encode_prompt([APPLE])
    assert len(one) == 1 and torch.equal(one.tokens_BLC, listed.tokens_BLC)


def test_generators_give_the_seeds_of_images(folders: tuple[Path, Path]) -> None:
    pipeline = ProMoEPipeline.from_pretrained(folders[1])

    def of(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    one = draw(pipeline, [APPLE] * 2, generator=of(3)[0])
    assert np.array_equal(draw(pipeline, [APPLE] * 2, generator=of(3)[0]), one)
    assert not np.array_equal(one[0], one[1])
    own = draw(pipeline, [APPLE] * 3, generator=of(3, 4, 3))
    np.testing.assert_allclose(own[[0, 2]], one[[0, 0]], atol=0.005)  # one step of 255
    assert not np.array_equal(own[0], own[1])
    with pytest.raises(ConfigError, match="generator: 2 for 1 images"):
        draw(pipeline, APPLE, generator=of(1, 2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"class_labels": [1]}, "class_labels: .*conditioned on text"),
        ({}, "class_labels: .*conditioned on text"),
        ({"prompt": APPLE, "negative_prompt": [HEART] * 2}, "negative_prompt: 2 for 1 prompts"),
        (
            {"prompt": APPLE, "negative_prompt": HEART, "guidance_scale": 1.0},
            "negative_prompt: has no effect at guidance scale 1",
        ),
        ({"prompt": APPLE, "guidance_interval": (1, 0)}, "guidance_interval=1,0: .*noise levels"),
    ],
)
def test_what_a_pipeline_of_texts_cannot_draw_is_refused(
    folders: tuple[Path, Path], given: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ProMoEPipeline.from_pretrained(folders[1])(**given)


def test_pipeline_without_its_text_encoder_says_so_and_another_is_not_exported(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    to_pipeline(folders[0], tmp_path / "bare")
    bare = ProMoEPipeline.from_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"prompt: .*no text_encoder and tokenizer"):
        draw(bare, APPLE)
    whole = ProMoEPipeline.from_pretrained(folders[1])
    bare.register_modules(text_encoder=whole.text_encoder, tokenizer=whole.tokenizer)
    assert np.array_equal(draw(bare, APPLE), draw(whole, APPLE))
    other = str(save_encoder(tmp_path / "other", "bert", seed=1))
    with pytest.raises(DataError, match=f"{other} has the weights"):
        to_pipeline(folders[0], tmp_path / "refused", text_encoder=other)
    with pytest.raises(ConfigError, match=r"--text-encoder .*conditioned on classes"):
        to_pipeline(make_export(tmp_path), tmp_path / "classes", text_encoder=other)
    of_classes = ProMoEPipeline(
        ProMoETransformer2DModel(random_network().config.model_dump(mode="json")),
        FlowMatchEulerDiscreteScheduler(),
    )
    with pytest.raises(ConfigError, match=r"prompt: .*conditioned on classes"):
        draw(of_classes, APPLE)


def small_transformer(**sections: Any) -> tuple[ProMoETransformer2DModel, DiffusionBatch]:
    """Return a network of random weights in training mode, and a batch, half of it null."""
    network = random_network(**sections)
    transformer = ProMoETransformer2DModel(network.config.model_dump(mode="json")).train()
    transformer.denoiser.load_state_dict(network.state_dict())
    condition = condition_of(network.config, torch.tensor([1, 3, 10, 10]))
    clean, noise = random_tensor(4, 1, 4, 4), random_tensor(4, 1, 4, 4, seed=1)
    return transformer, DiffusionBatch(clean, noise, torch.linspace(0.1, 0.9, 4), condition)


def predict(transformer: ProMoETransformer2DModel, batch: DiffusionBatch) -> Any:
    module = TrainingModule(transformer.denoiser)
    noised, timestep = module.objective.noised(batch), module.objective.timestep(batch)
    return transformer(noised, timestep, batch.condition)


def test_transformer_returns_the_losses_that_training_adds_and_none_in_evaluation() -> None:
    transformer, batch = small_transformer()
    terms = TrainingModule(transformer.denoiser)(batch).terms
    output = predict(transformer, batch)
    assert output.aux_losses.keys() == terms.keys() - {"diffusion"} == {"rcl"}
    assert torch.equal(output.aux_losses["rcl"], terms["rcl"])
    sum(output.aux_losses.values()).backward()
    keys = [value for name, value in transformer.named_parameters() if "prototypes" in name]
    assert keys and all(value.grad.abs().sum() > 0 for value in keys)
    transformer.eval()
    assert predict(transformer, batch).aux_losses is None
    assert len(transformer(batch.clean_BZHW, 500.0, batch.condition, return_dict=False)) == 1


def test_adapters_of_attention_learn_alone_and_pass_through_their_file(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformer, batch = small_transformer()
    before = predict(transformer, batch).sample
    targets = ["attention.qkv", "attention.proj"]
    transformer.add_adapter(peft.LoraConfig(r=2, target_modules=targets))
    learning = {name for name, value in transformer.named_parameters() if value.requires_grad}
    assert len(learning) == 8 and all("attention" in name and "lora_" in name for name in learning)
    assert torch.equal(
        predict(transformer, batch).sample, before
    )  # an adapter starts without effect

    def losses() -> list[Tensor]:
        output = predict(transformer, batch)
        return [(output.sample - batch.clean_BZHW).square().mean(), output.aux_losses["rcl"]]

    optimizer = torch.optim.SGD((p for p in transformer.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        torch.stack(losses()).sum().backward()
        optimizer.step()
    after = predict(transformer, batch).sample
    assert not torch.equal(after, before)
    transformer.save_lora_adapter(tmp_path)
    fresh, _ = small_transformer()
    fresh.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.equal(predict(fresh, batch).sample, after)
