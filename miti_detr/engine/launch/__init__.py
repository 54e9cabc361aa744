"""Starting a run in one or several processes, and ending it well."""

from .start import add_run_arguments, resume_command, run, tell_how_to_resume

__all__ = ["add_run_arguments", "resume_command", "run", "tell_how_to_resume"]
