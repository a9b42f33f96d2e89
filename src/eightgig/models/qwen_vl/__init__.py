"""Qwen-VL and Qwen-VL-Chat: model, images and tokens, written anew for transformers 5 (its published code is not)."""
