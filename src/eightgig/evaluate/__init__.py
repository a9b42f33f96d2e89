"""Validation: loss, generated answers, metrics."""
