"""``python -m imprompt``: the command line."""

import sys

from imprompt.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
