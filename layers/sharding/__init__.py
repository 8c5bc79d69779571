"""Arrays on a mesh: axis names, collectives, and pipeline parallelism."""
