"""Pictures and figures read off runs and models."""
