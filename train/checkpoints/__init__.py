"""Checkpoints of a run: saved asynchronously, verified by checksum, restored onto any mesh."""
