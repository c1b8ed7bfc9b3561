"""`python -m jdiff`: the command line, where its script is not on the path."""

from jdiff.cli import main

raise SystemExit(main())
