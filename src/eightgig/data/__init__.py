"""The way from a user's files to micro-batches: formats, images, checks, chat template, labels, order, workers."""
