"""What to do with a finished run."""
