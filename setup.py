"""Packaging of miti_detr.

Detectron2 is no requirement here on purpose: it is not on the package index, and one that is
installed is used as it is.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
CONFIGS = "miti_detr.model_zoo.configs"


def read_version() -> str:
    """Return ``miti_detr.__version__`` without importing the package."""
    text = (ROOT / "miti_detr" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise ValueError('miti_detr/__init__.py has no line __version__ = "..."')
    return match[1]


FAST_EVAL = ["faster-coco-eval>=1.6"]
HF = ["transformers>=4.40", "safetensors"]
VISUALIZER = ["opencv-python-headless>=4.8"]  # of Detectron2, which does not ask for it
TIMM = ["timm>=1.0"]
DEV = [
    "pytest>=8",
    "pytest-cov",
    "pytest-xdist",
    "ruff",
    "mypy",
    *VISUALIZER,
    *FAST_EVAL,
    *HF,
    *TIMM,
]

setup(
    name="miti_detr",
    version=read_version(),
    description="Miti-DETR and DETR for Detectron2",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8")
    if (ROOT / "README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["miti_detr", "miti_detr.*", "benchmarks"]), CONFIGS],
    # The YAML files live at the top of the repository, where Detectron2 users look for them, and
    # install below the package.
    package_dir={CONFIGS: "configs"},
    package_data={CONFIGS: ["**/*.yaml"], "miti_detr": ["py.typed", "study/*.html"]},
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "numpy>=1.26",
        "scipy>=1.11",
        "pillow>=10.1",
        "pycocotools>=2.0.7",
        "matplotlib>=3.8",
        "fvcore>=0.1.5",
        "iopath>=0.1.9",
        "yacs>=0.1.8",
        "tqdm>=4.66",
        "tabulate>=0.9",
        "termcolor>=1.1",
        "PyYAML>=6",
        "jinja2>=3.1",
    ],
    extras_require={"fast-eval": FAST_EVAL, "hf": HF, "timm": TIMM, "dev": DEV},
    entry_points={"console_scripts": ["miti-detr = miti_detr.cli.main:main"]},
)
