"""`python -m mptq` is `mptq`."""

from mptq.cli.app import main

if __name__ == "__main__":
    main()
