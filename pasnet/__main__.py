"""`python -m pasnet`: the same as the command `pasnet`."""

from pasnet.cli import main

raise SystemExit(main())
