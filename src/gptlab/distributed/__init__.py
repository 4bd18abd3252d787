"""Data-parallel training of one run by several processes: DDP and FSDP2, started by torchrun."""
