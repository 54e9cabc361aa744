"""Annotation files in COCO format: structure, ids, fields, and the normalised content."""
