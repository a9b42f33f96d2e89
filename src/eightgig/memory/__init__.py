"""Levers on memory: each module changes the model or the process in one way."""
