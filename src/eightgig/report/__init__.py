"""What a run left in its folder, read back and drawn as one self-contained HTML file."""
