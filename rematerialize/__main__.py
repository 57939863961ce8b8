"""``python -m rematerialize`` is the command line."""

from rematerialize.cli import main

if __name__ == "__main__":
    main()
