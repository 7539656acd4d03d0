"""Adapters: the losses of training stacks, with their signatures and fastkd underneath."""
