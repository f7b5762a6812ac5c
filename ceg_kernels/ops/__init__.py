"""The op declarations, one file an op; importing them fills `ceg_kernels.op.OPS`."""
