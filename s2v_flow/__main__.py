"""`python -m s2v_flow`."""

from s2v_flow.cli import main

main()
