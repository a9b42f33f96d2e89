"""What a run will take before it runs: a trace of its memory and what PyTorch's allocator makes of it."""
