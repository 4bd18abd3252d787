"""Several processes that train one run, each on its share of every batch: DDP or FSDP2, started by torchrun."""
