"""Losses over several processes: those that share a vocabulary, and those that have rows of their own.

Read in this order:

    collectives.py   the collectives, and errors that name them
    agreement.py     whether all processes make the same call, before any of them could wait for another
    shards.py        a backend's rows whose columns are spread over processes: fastkd/call/contract.py has its steps
    layout.py        what of DTensors and of full tensors is this process's
    batch.py         num_items of a batch whose rows are spread over processes, as DDP and FSDP do

Processes are those of a torch.distributed process group, on any of its backends.
"""

from fastkd.parallel.batch import num_items
from fastkd.parallel.collectives import CollectiveError

__all__ = ["CollectiveError", "num_items"]
