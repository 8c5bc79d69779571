"""A training run: the loop, its folder, metrics, progress and report."""
