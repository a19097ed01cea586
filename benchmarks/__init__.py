"""What the project's figures come from; each file is run by hand, see `README.md`."""
