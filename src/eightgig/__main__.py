"""`python -m eightgig`, as `accelerate launch -m eightgig` needs it."""

from eightgig.cli import main

if __name__ == "__main__":
    main()
