"""Losses over several processes, which share the vocabulary or have different rows.

Read in this order:

    collectives.py   the collectives, and errors that name them
    agreement.py     checks that all processes make the same call, before any of them could wait for another
    shards.py        runs a backend on rows whose columns are spread over processes (steps: fastkd/call/contract.py)
    layout.py        this process's part of DTensors and of full tensors
    share.py         turns the validated call of each process into one call of all
    batch.py         num_items of a batch whose rows are spread over processes, as by DDP and FSDP
    heads.py         the lm_head of a model that DDP, FSDP2, ZeRO-3 or PEFT wraps, and losses inside its forward

The processes belong to a torch.distributed process group, with any of its backends.
"""

from fastkd.parallel.batch import num_items
from fastkd.parallel.collectives import CollectiveError
from fastkd.parallel.heads import Head, head, redirect

__all__ = ["CollectiveError", "Head", "head", "num_items", "redirect"]
