"""`python -m seqlib.lm` is `seqlib-lm`."""

from .cli import main

if __name__ == "__main__":
    main()
