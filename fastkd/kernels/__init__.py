"""The Triton kernels. Their sources are in kernels/ at the top of the repository; a wheel has them beside this file."""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]

# In a checkout only: next to an installed fastkd, `kernels` would be some other package.
if (_ROOT / "csrc" / "module.cpp").is_file():
    __path__.append(str(_ROOT / "kernels"))
