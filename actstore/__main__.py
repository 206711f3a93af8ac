"""Run `python -m actstore` as the command `actstore`."""

from actstore.cli import main

main()
