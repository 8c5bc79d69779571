"""Flash attention for TPUs (Pallas, Mosaic)."""
