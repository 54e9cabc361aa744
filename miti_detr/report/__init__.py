"""The parts of self-contained pages."""
