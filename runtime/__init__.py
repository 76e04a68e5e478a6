"""One process among many: ranks, heartbeat, seeds, folders, the screen, errors, and `run_script`."""
