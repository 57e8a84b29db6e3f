"""`python -m tensorkv`: the same as the command `tensorkv`."""

from tensorkv.cli.main import main

if __name__ == "__main__":
    main()
