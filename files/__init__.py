"""What lies on disk: atomic writes, the checkpoint schema, safe reading, locks."""
