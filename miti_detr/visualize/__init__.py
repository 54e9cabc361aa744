"""Pictures of runs and models: curves, detections, attention maps."""
