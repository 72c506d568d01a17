"""`python -m tandem_attn`: the same as `tandem-attn`."""

import sys

from tandem_attn.cli import main

if __name__ == "__main__":
    sys.exit(main())
