"""Packaging: `pip install -e '.[megatron,report,test]'`."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "megatron": ["megatron-core>=0.16,<0.17"],
    "te": ["transformer-engine[pytorch]>=2.3"],
    "eval": ["torch-fidelity>=0.4"],
    "report": ["vl-convert-python>=1.7", "scikit-learn>=1.4"],
    "tracking": ["tensorboard>=2.15", "wandb>=0.16"],
    "test": ["pytest>=9", "pytest-timeout>=2.3", "hypothesis>=6.100", "scikit-learn>=1.4", "tensorboard>=2.15",
             "jsonschema>=4.18", "scipy>=1.10", "prdc>=0.2", "ruff>=0.6"],
}

setup(
    name="promoe_ds",
    version="0.1.0",
    description="Distributed training of ProMoE diffusion transformers with DeepSpeed expert parallelism",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["promoe_ds", "promoe_ds.*"]),
    package_data={"promoe_ds": ["recipes/*.yaml", "recipes/superclasses/*.yaml", "reports/*.j2"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19,<0.20",
        "diffusers>=0.36",
        "safetensors>=0.4",
        "pydantic>=2.6",
        "pyyaml>=6",
        "numpy>=1.26",
        "pillow>=10",
        "tqdm>=4.66",
        "rich>=13",
        "xxhash>=3.4",
        "msgspec>=0.19",
        "jinja2>=3.1",
    ],
    extras_require=EXTRAS,
)
