# Metadata is in pyproject.toml, which cannot add the folder of YAML files to the packages it finds.
from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["miti_detr*"]), "miti_detr.model_zoo.configs"])
