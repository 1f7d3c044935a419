"""Packaging of mcm-jax. The tools' settings (ruff, pytest) are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

README = pathlib.Path(__file__).with_name("README.md")

setup(
    name="mcm-jax",
    version=re.search(
        r'__version__ = "(.+)"', pathlib.Path(__file__).with_name("mcm_jax").joinpath("version.py").read_text()
    )[1],
    description="Spatial control for frozen diffusion models: Multimodal Conditioning Modules in JAX and Flax",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["mcm_jax", "mcm_jax.*"]),
    package_data={"mcm_jax": ["assets/**"]},
    install_requires=[
        "absl-py>=2.1",
        "flax>=0.12.8,<0.13",
        "grain>=0.2.18",
        "jax>=0.10.2,<0.13",
        "ml_collections>=1.1",
        "numpy>=2",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow>=10.3",
        "safetensors>=0.4.3",
        "scipy>=1.14.1,<2",
        "tensorboardX>=2.6.2",
        "tqdm>=4.66",
    ],
    extras_require={
        # Of bases: prompts, names on the Hugging Face Hub, weights in .bin files.
        "text": ["transformers>=5,<6"],
        "hub": ["huggingface_hub>=0.30,<3"],
        "torch": ["torch>=2.10"],
        # Extractors of conditions from pictures.
        "data": ["scikit-image>=0.25,<0.27"],
        # Judges and extractors that are ONNX files.
        "onnx": ["onnxruntime>=1.20,<2"],
        # Data sets of TensorFlow Datasets, without TensorFlow. TFDS imports importlib_resources without asking for it.
        "tfds": ["array_record>=0.8,<1", "importlib_resources>=6", "pyarrow>=15", "tensorflow-datasets>=4.9.10,<5"],
        # Reports of training beside metrics.jsonl and TensorBoard.
        "wandb": ["wandb>=0.19,<1"],
        # The picture of a sweep.
        "sweep": ["matplotlib>=3.9,<4"],
        # PyTorch and diffusers are the oracle that the native networks are held against; mcm_jax imports neither.
        "test": [
            "mcm-jax[data,hub,onnx,sweep,text,tfds,torch]",
            "diffusers==0.42.1",
            "onnx>=1.17,<2",
            "pytest>=8.2,<10",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.17.6,<0.18",
            "torch==2.13.0",
            "transformers==5.23.0",
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
