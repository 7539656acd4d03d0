"""The helpers of examples/swap/originals.py, which import single files of a stack's package."""

from __future__ import annotations

import importlib.util

from support.paths import ROOT

_spec = importlib.util.spec_from_file_location(
    "swap_originals", ROOT / "examples" / "swap" / "originals.py"
)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
stand_ins = _module.stand_ins
