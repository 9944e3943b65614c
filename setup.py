"""Metadata, and the mapping that gives the folder ``kernels/`` its import name ``lowrank_ops.kernels``.

The top-level name ``kernels`` belongs to another package on PyPI, so the folder is only ever installed
inside ``lowrank_ops``.
"""

from pathlib import Path

from setuptools import setup

DEMO = ["accelerate>=1.1", "transformers>=5.0", "gguf>=0.10", "tqdm", "matplotlib"]

setup(
    name="lowrank-ops",
    version="0.1.0",
    description="Low-rank adapter layers whose work rides inside the GEMMs that run anyway",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["lora", "fine-tuning", "triton", "gpu", "peft"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    package_dir={"lowrank_ops": "lowrank_ops", "lowrank_ops.kernels": "kernels"},
    packages=[
        "lowrank_ops",
        "lowrank_ops.kernels",
        "lowrank_ops.methods",
        "lowrank_ops.ops",
        "lowrank_ops.reference",
    ],
    package_data={"lowrank_ops": ["py.typed"], "lowrank_ops.kernels": ["_tables/*.json"]},
    # safetensors is in the core because adapter files are, tqdm for the bar that salr.prune shows unless told
    # otherwise; they need nothing else
    install_requires=[
        "torch>=2.11",
        "numpy",
        "safetensors>=0.4.3",
        "tqdm",
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require={
        "transformers": ["transformers>=5.0"],
        "peft": ["peft>=0.21"],
        "demo": DEMO,
        "test": [*DEMO, "peft>=0.21", "pytest>=8", "pytest-benchmark", "pytest-xdist", "ruff"],
    },
)
