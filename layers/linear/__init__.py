"""Linear maps between named axes, embeddings, and the sharded matmuls that compute them."""
