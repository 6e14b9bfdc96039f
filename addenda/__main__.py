"""`python -m addenda`."""

from addenda.cli import main

main()
