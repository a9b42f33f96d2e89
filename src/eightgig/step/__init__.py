"""Forward, target-only loss, backward, update: the one piece of code that training runs."""
