"""The command line with the tiny backbone, as a program of its own: for jobs of several processes."""

import sys

from chanscale import cli
from tiny_backbone import register

if __name__ == "__main__":
    register()
    sys.exit(cli.run(sys.argv[1:]))
