"""Backbones: any of Detectron2, with the padding mask of their feature."""
