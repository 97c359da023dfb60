"""`python -m porttool`: the command line where its script is not on the path."""

from porttool.cli import main

if __name__ == "__main__":
    main()
