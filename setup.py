"""Package data, dependencies, extras and the `minigpt` command."""

from setuptools import setup

EXTRAS = {
    "hf": ["tokenizers"],
    "serve": ["fastapi", "uvicorn"],
    "track": ["tensorboard", "wandb"],
    "eval": ["sacrebleu", "rouge-score", "lm-eval"],
    "ui": ["rich"],
    "viz": ["matplotlib"],
    "test": ["pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis", "transformers>=5,<6", "tokenizers",
             "tiktoken", "peft", "sacrebleu", "rouge-score", "scikit-learn", "matplotlib", "jsonschema"],
    "dev": ["ruff"],
}

setup(
    name="minigpt",
    version="0.1.0",
    description="A GPT from scratch in PyTorch with its own Triton kernels: train, sample, measure.",
    packages=["minigpt", "kernels"],
    package_data={"minigpt": ["tokenizer_texts.toml"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11,<2.15",
        # a CUDA build of torch requires its own release of triton; the CPU build leaves the choice to this range
        'triton>=3.6,<3.10; sys_platform == "linux"',
        "numpy>=1.26",
        "sentencepiece>=0.2",
        "safetensors>=0.5",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["minigpt = minigpt.cli:main"]},
)
