"""Text generation: sampling, KV-cache sessions, speculative decoding, streaming and chat."""
