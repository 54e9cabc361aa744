"""The one error of this package."""


class CheckpointError(ValueError):
    """A file, or the weights in it, cannot be used; the message says which, why and what to do."""
