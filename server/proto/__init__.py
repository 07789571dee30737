"""Protocol definitions; the modules beside each .proto file are made from it by `make proto`."""
