#!/usr/bin/env python3
"""Tables and curves of a sweep: the same as ``longclip collect``, with the same arguments."""

import sys

from longclip.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "collect")
    main()
