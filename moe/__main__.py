"""`python -m moe` and `torchrun -m moe`: the command line."""

from moe.cli import main

if __name__ == "__main__":
    main()
