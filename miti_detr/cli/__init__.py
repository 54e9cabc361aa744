"""The command line: one short file per command, without logic of its own."""
