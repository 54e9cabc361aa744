"""Weights from anywhere: conversion by tables, a safe reader, a checkpointer that applies both."""

from .attach import accept_weights, adapt_state_dict, attach_variant
from .checkpointer import MitiDetrCheckpointer
from .convert import (
    ConversionReport,
    convert_state_dict,
    recognise,
    to_d2_wrapper,
    to_official,
)
from .errors import CheckpointError
from .files import read_checkpoint
from .frozen import load_frozen
from .huggingface import to_hf
from .variant import make_record

__all__ = [
    "CheckpointError",
    "ConversionReport",
    "MitiDetrCheckpointer",
    "accept_weights",
    "adapt_state_dict",
    "attach_variant",
    "convert_state_dict",
    "load_frozen",
    "make_record",
    "read_checkpoint",
    "recognise",
    "to_d2_wrapper",
    "to_hf",
    "to_official",
]
