"""`python -m s2v_flow`."""

from s2v_flow.cli.main import main

main()
