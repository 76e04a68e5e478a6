"""Pruning methods: saliency of units, and the selections built on it."""
