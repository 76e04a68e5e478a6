"""One file a method, between its script and its mathematics: flags, steps, logs."""
