"""What every run shares: the full model, its parts, dense training, resume, results, provenance, curves."""
