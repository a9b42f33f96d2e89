"""What a run leaves for others to use, and the proof that it works without EightGig."""
