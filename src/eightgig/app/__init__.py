"""One function per verb of the command line, callable from Python with the same effect."""
