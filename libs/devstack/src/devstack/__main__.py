"""`python -m devstack` is the `pressroom` command."""

from devstack.cli import main

main()
