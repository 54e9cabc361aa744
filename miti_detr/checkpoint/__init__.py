"""Weights from anywhere: conversion by tables, a safe reader, a checkpointer that applies both."""

from .checkpointer import MitiDetrCheckpointer
from .convert import (
    ConversionReport,
    convert_state_dict,
    recognise,
    to_d2_wrapper,
    to_official,
)
from .errors import CheckpointError
from .files import atomic_write, read_checkpoint
from .hooks import adapt_state_dict, record_variant
from .huggingface import to_hf
from .variant import make_record

__all__ = [
    "CheckpointError",
    "ConversionReport",
    "MitiDetrCheckpointer",
    "adapt_state_dict",
    "atomic_write",
    "convert_state_dict",
    "make_record",
    "read_checkpoint",
    "recognise",
    "record_variant",
    "to_d2_wrapper",
    "to_hf",
    "to_official",
]
