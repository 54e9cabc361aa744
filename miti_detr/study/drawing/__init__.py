"""Pictures of a comparison: curves, trends, and detections on single images."""
