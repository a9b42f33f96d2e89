"""How the embedded model was made: run `python -m benchmarks.demo_model.train` on a GPU machine."""
