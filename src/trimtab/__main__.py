"""`python -m trimtab`: the command line, where the console script is not on the path."""

from trimtab.cli import main

if __name__ == "__main__":
    main()
