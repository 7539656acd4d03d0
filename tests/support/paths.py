"""Paths of the checkout, the recorded logits and the package under test."""

from pathlib import Path

import fastkd

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).parent / "data"
# The folder that holds fastkd, for a process that is started elsewhere: in a checkout ROOT, else site-packages.
PACKAGE = Path(fastkd.__file__).resolve().parents[1]
