from typing import Any

OPTION_NAMES: str
STATISTICS: int  # numbers a row that processes exchange which share a vocabulary
SUMS: int

def kd_rows(*arguments: Any) -> None: ...
def scale_rows(*arguments: Any) -> None: ...
def plan(
    vocabulary: int,
    student_dtype: int,
    teacher_dtype: int,
    sparse: bool,
    rows: int = 1,
    multiprocessors: int = 0,
) -> tuple[int, int, int] | None: ...
def divergences() -> list[str]: ...
def architectures() -> list[int]: ...
