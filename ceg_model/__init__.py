"""A GPT built on ceg_kernels, and the study that tells hardware gain from algorithmic gain."""
