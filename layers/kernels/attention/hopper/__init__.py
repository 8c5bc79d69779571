"""Flash attention for H100 and H200 GPUs (Pallas, Mosaic GPU)."""
