"""A training step on CUDA tensors that do not exist: what a GPU would be asked to do.

`device` builds the guard that torch needs for it and stands in for torch.cuda, `recorder` notes
what is asked, `account` sorts and prices it, `step` runs the trainer. `python -m
benchmarks.fake_cuda` traces in a process of its own, since the guard must be loaded before torch.
"""
