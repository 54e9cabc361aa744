"""One training step, and what it needs: the next batch, and a record of what it has done."""
