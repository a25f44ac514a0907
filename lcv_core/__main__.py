"""`python -m lcv_core` is `lcv`."""

from lcv_core.cli import main

main()
