"""`python -m qig_serve` is the `qig-serve` command."""

from qig_serve.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
