"""What the machine raises."""

from __future__ import annotations


class Fault(Exception):  # noqa: N818 (the word of the field for what stops a program on a device)
    """The program does what a device forbids or leaves undefined, or what the machine does not implement."""
