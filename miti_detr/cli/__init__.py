"""The command line: one short file per command, which only calls the other rooms."""
