"""`python -m seqlib.lra` is `seqlib-lra`."""

from .cli import main

if __name__ == "__main__":
    main()
