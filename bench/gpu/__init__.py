"""What a GPU can prove, in under ten minutes: `python -m bench.gpu`, or `make gpu`."""
