"""Run the command line with `python -m chanscale`."""

from chanscale.cli import main

if __name__ == "__main__":
    main()
