"""`python -m memplan` is the command line."""

from memplan.cli import main

if __name__ == "__main__":
    main()
