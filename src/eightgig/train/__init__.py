"""The training loop: readable from top to bottom, on accelerate; owns logging, files and the order of things."""
