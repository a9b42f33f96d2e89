"""The demo: the model that ships in the package, the scenes it was pretrained on and the task that is new to it."""
