"""What the server has beyond vLLM's own: safeguards, `/v1/quantization` and the page at `/`."""
