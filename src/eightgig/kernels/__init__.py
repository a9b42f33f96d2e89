"""Autograd functions written by hand, each with one door: the numbers of the plain path, less launched, less kept."""
