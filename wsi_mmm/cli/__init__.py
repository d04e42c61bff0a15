"""The command line: each command is a few lines that forward to `wsi_mmm.api`."""
