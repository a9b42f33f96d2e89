"""Checkpoints: folders of safetensors and JSON with a manifest, there whole or not at all."""
