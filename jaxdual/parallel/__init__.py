"""One model over many devices: tensor, data and expert parallelism."""
