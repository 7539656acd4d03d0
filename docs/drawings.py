"""Writes the drawings of docs/kernels.md and docs/index.md to docs/img: python docs/drawings.py

They are 400 units wide, so that their text can be read on a telephone. A file shown by itself follows the light or dark
setting of the reader's system. On the site, a drawing is part of the page and takes its colours (docs/site/hooks.py,
docs/stylesheets/site.css).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent / "img"
WIDTH = 400
LIGHT = {
    "ink": "#1f2328", "soft": "#59636e", "line": "#8c959f", "box": "#eef1f4",
    "student": "#cfe3ff", "teacher": "#ffe2b3", "gradient": "#c9efd0", "numbers": "#e6dcff",
}  # fmt: skip
DARK = {
    "ink": "#e6edf3", "soft": "#aab4bf", "line": "#7d8590", "box": "#2b3038",
    "student": "#1d4a80", "teacher": "#73500f", "gradient": "#1f5c33", "numbers": "#4a3a80",
}  # fmt: skip


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


STYLE = (
    f".drawing {{ {_variables(LIGHT)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ .drawing {{ {_variables(DARK)} }} }}\n"
)


class Drawing:
    """A list of shapes, and the height they need."""

    def __init__(self) -> None:
        self.shapes: list[str] = []
        self.height = 0.0

    def _add(self, shape: str, bottom: float) -> None:
        self.shapes.append(shape)
        self.height = max(self.height, bottom)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        text: str = "",
        dashed: bool = False,
    ) -> None:
        """A rectangle with centred lines of text."""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self._add(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="var(--{fill})" '
            f'stroke="var(--line)"{dash}/>',
            y + height,
        )
        lines = text.split("\n") if text else []
        for number, line in enumerate(lines):
            self.text(
                x + width / 2,
                y + height / 2 + 4.5 + 16 * (number - (len(lines) - 1) / 2),
                line,
                "middle",
            )

    def text(
        self,
        x: float,
        y: float,
        line: str,
        anchor: str = "start",
        colour: str = "ink",
        bold: bool = False,
    ) -> None:
        """One line of text; y is its baseline."""
        weight = ' font-weight="600"' if bold else ""
        self._add(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="var(--{colour})"{weight}>{escape(line)}</text>',
            y + 4,
        )

    def title(self, y: float, line: str) -> None:
        """A heading inside the drawing."""
        self.text(0, y, line, bold=True)

    def note(self, y: float, line: str) -> None:
        """A remark below a shape."""
        self.text(0, y, line, colour="soft")

    def arrow(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """A straight arrow."""
        self._add(
            f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="var(--line)" stroke-width="1.5" '
            'marker-end="url(#head)"/>',
            max(y0, y1),
        )

    def svg(self) -> str:
        """The SVG file."""
        body = "\n".join(self.shapes)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" role="img" viewBox="-4 -4 {WIDTH + 8} '
            f'{self.height + 8:g}" font-family="system-ui, sans-serif" font-size="13">\n<style>\n{STYLE}</style>\n'
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="var(--line)"/></marker></defs>\n'
            f"{body}\n</svg>\n"
        )


def measured(case: str) -> dict[str, list[str]]:
    """The rows of one case of the peers' table in docs/benchmarks.md: contender to cells."""
    text = (Path(__file__).parent / "benchmarks.md").read_text(encoding="utf-8")
    table = text.partition(f"| **{case}")[2].partition("| **")[0]
    rows = re.findall(r"^\| ([^|]+) \| (.+) \|$", table, re.M)
    return {contender: cells.split(" | ") for contender, cells in rows}


def gains() -> Drawing:
    """Time, memory and error of forward KL in fastkd and in other code, with the figures of docs/benchmarks.md."""
    d = Drawing()
    rows = measured("forward KL on logits: 256 x 49,152, float32")
    contenders = {
        "fastkd": rows["fastkd (cpu)"],
        "torch.compile": rows["torch.compile"],
        "PyTorch, eager": rows["eager"],
        "TRL": rows["TRL generalized_jsd_loss"],
    }
    panels = (
        ("Time, ms", 0),
        ("Extra memory, MiB", 2),
        ("Gradient error against float64", 4),
    )
    y = 0.0
    for title, column in panels:
        d.title(y + 12, title)
        largest = max(float(cells[column]) for cells in contenders.values())
        for name, cells in contenders.items():
            y += 22
            length = 240 * float(cells[column]) / largest
            d.text(96, y + 12, name, "end")
            d.box(
                102,
                y,
                max(length, 1.5),
                16,
                "gradient" if name == "fastkd" else "box",
            )
            d.text(108 + max(length, 1.5), y + 12, cells[column], colour="soft")
        y += 40
    return d


def statistics() -> Drawing:
    """The first sweep: the statistics of a block, and how two blocks are merged."""
    d = Drawing()
    d.title(12, "One row, read once, block by block")
    for side, fill, y in (
        ("student s", "student", 24),
        ("teacher t", "teacher", 52),
    ):
        d.text(0, y + 15, side)
        for block in range(4):
            d.box(
                72 + 84 * block,
                y,
                76,
                22,
                fill,
                ("0 …", "2048 …", "4096 …", "… V-1")[block],
            )
    for block in range(4):
        x = 110 + 84 * block
        d.arrow(x, 76, x, 94)
        d.box(x - 38, 96, 76, 54, "numbers", "max m\nsum Z\nmoments")
        d.arrow(x, 150, x, 174)
    d.box(
        72,
        176,
        328,
        60,
        "numbers",
        "merged, in the order of the blocks\nm = max(m₁, m₂)\nZ = Z₁ e^(m₁-m) + Z₂ e^(m₂-m)",
    )
    d.arrow(236, 236, 236, 256)
    d.box(
        72,
        258,
        328,
        60,
        "box",
        "log-sum-exp of s and of t: both softmaxes\nA = E_p[t - s]: KL(p‖q) = A - lse t + lse s\n"
        "the loss of the row, with a closed form",
    )
    d.note(338, "x = s/T or t/T, Z = Σ e^(x-m). If the maximum rises,")
    d.note(355, "earlier sums are rescaled. Nothing is read twice.")
    return d


def sweeps() -> Drawing:
    """The two or three sweeps, with what each reads and writes."""
    d = Drawing()

    def sweep(
        y: float, name: str, why: str, reads: str, back: bool, dashed: bool = False
    ) -> None:
        d.title(y + 12, name)
        d.note(y + 30, why)
        d.box(0, y + 40, 190, 24, "student", "student logits", dashed)
        d.box(0, y + 68, 190, 24, "teacher", "teacher logits", dashed)
        d.arrow(
            *((190, y + 102, 0, y + 102) if back else (0, y + 102, 190, y + 102))
        )
        d.text(95, y + 118, reads, "middle", "soft")

    sweep(
        0,
        "1  statistics",
        "log-sum-exps, moments, the label's logit",
        "from memory",
        False,
    )
    d.box(236, 44, 164, 40, "numbers", "a dozen numbers")
    d.arrow(192, 64, 232, 64)
    sweep(
        144,
        "2  sums",
        "Σ φ and Σ g: only without a closed form",
        "from cache",
        False,
        True,
    )
    d.box(236, 188, 164, 40, "numbers", "the loss, Σ g")
    d.arrow(192, 208, 232, 208)
    sweep(
        288,
        "3  gradient",
        "last block first: the cache still holds it",
        "from cache",
        True,
    )
    d.box(236, 332, 164, 40, "gradient", "(g - q Σ g) / T")
    d.arrow(192, 352, 232, 352)
    d.note(428, "If the row fits in a cache, memory moves three tensors:")
    d.note(445, "two read, one written, and no probabilities.")
    return d


def chunks() -> Drawing:
    """The fused linear loss, one chunk of rows at a time."""
    d = Drawing()
    d.title(12, "A chunk of C rows; the next chunk reuses the buffers")
    d.box(0, 28, 70, 150, "box")
    d.box(0, 66, 70, 40, "student", "C rows")
    d.text(0, 196, "hidden [N, H]", colour="soft")
    d.text(84, 91, "·", "middle")
    d.box(98, 66, 88, 40, "box", "head [V, H]")
    d.arrow(188, 86, 208, 86)
    d.box(212, 54, 188, 64, "student", "student logits [C, V]\nfloat32, one buffer")
    d.text(98, 144, "the teacher's:", colour="soft")
    d.text(98, 161, "the same", colour="soft")
    d.box(212, 126, 188, 44, "teacher", "teacher logits [C, V]")
    d.arrow(306, 172, 306, 196)
    d.box(
        212,
        198,
        188,
        44,
        "gradient",
        "the kernel, in place:\nG = ∂loss/∂logits [C, V]",
    )
    d.arrow(270, 244, 196, 272)
    d.arrow(330, 244, 330, 272)
    d.box(60, 276, 160, 44, "gradient", "∂hidden = G · head\nfor these C rows")
    d.box(236, 276, 164, 44, "gradient", "∂head += Gᵀ · hidden\nin float32")
    d.note(344, "Four matrix products, none computed twice. Two buffers")
    d.note(361, "[C, V] are stored; memory_budget= or chunk_size= sets C.")
    d.note(378, "Dropped rows are removed first.")
    return d


def split() -> Drawing:
    """Triton: one program per row, or several."""
    d = Drawing()
    d.title(12, "Many rows: one program a row, one launch")
    for row in range(4):
        d.box(
            0,
            24 + 24 * row,
            400,
            20,
            "student",
            f"row {row}: program {row}, all sweeps",
        )
    d.title(148, "Few rows: several programs a row, a launch a sweep")
    for row in range(2):
        for program in range(4):
            d.box(
                101 * program,
                160 + 26 * row,
                97,
                22,
                "student",
                f"row {row}, part {program}",
            )
    for program in range(4):
        d.arrow(48 + 101 * program, 210, 48 + 101 * program, 232)
    d.box(0, 234, 400, 26, "numbers", "each stores its statistics in device memory")
    for program in range(4):
        d.arrow(48 + 101 * program, 260, 48 + 101 * program, 282)
    d.box(
        0,
        284,
        400,
        26,
        "numbers",
        "next launch: each merges all statistics, in one order",
    )
    for program in range(4):
        d.arrow(48 + 101 * program, 310, 48 + 101 * program, 332)
    for program in range(4):
        d.box(101 * program, 334, 97, 22, "gradient", f"part {program}")
    d.note(378, "If L2 can hold a group of rows (sm_80, sm_89), it goes")
    d.note(395, "through all launches before the next group starts.")
    return d


def cluster() -> Drawing:
    """CUDA: a row in the shared memory of a cluster."""
    d = Drawing()
    d.title(12, "A cluster of thread blocks processes one row at a time")
    d.box(0, 24, 400, 24, "box", "device memory: one row of both sides")
    for block in range(4):
        x = 101 * block
        d.arrow(x + 48, 50, x + 48, 70)
        d.box(x, 72, 97, 116, "box")
        d.text(x + 48, 88, f"block {block}", "middle", bold=True)
        d.box(x + 8, 96, 81, 24, "student", "slice of s")
        d.box(x + 8, 124, 81, 24, "teacher", "slice of t")
        d.box(x + 8, 152, 81, 24, "numbers", "sums")
    d.text(200, 206, "each writes its sums to every other block", "middle", "soft")
    d.arrow(60, 214, 340, 214)
    d.arrow(340, 222, 60, 222)
    for block in range(4):
        x = 101 * block
        d.box(x, 234, 97, 24, "gradient", "gradient")
        d.arrow(x + 48, 260, x + 48, 280)
    d.box(0, 282, 400, 24, "box", "device memory: the row of the gradient")
    d.title(338, "A slice has four stages")
    for stage, (fill, text) in enumerate(
        (
            ("box", "next row\narrives"),
            ("box", "next row\narrives"),
            ("gradient", "being\nwritten"),
            ("student", "this row\nwaits"),
        )
    ):
        d.box(101 * stage, 350, 97, 42, fill, text)
    d.note(412, "Every logit is read from device memory once. After a stage's")
    d.note(429, "gradient is written, the next row's logits are fetched there.")
    return d


def topk() -> Drawing:
    """A sparse teacher: K tokens and one event for the rest."""
    d = Drawing()
    d.title(12, "A student's row, and K = 3 tokens of the teacher")
    tokens = {2, 7, 8}
    for column in range(12):
        d.box(
            33.4 * column, 26, 31, 26, "teacher" if column in tokens else "student"
        )
    for number, column in enumerate(sorted(tokens)):
        d.arrow(33.4 * column + 15, 54, 48 + 101 * number, 92)
    d.arrow(366, 54, 351, 92)
    for number in range(3):
        d.box(101 * number, 94, 97, 30, "teacher", f"token {number + 1}")
    d.box(303, 94, 97, 30, "student", "the tail")
    d.text(400, 142, "tail: T log Σ e^(z/T) of the others", "end", "soft")
    d.arrow(200, 150, 200, 170)
    d.box(
        0,
        172,
        400,
        44,
        "numbers",
        "any divergence, dense, over K + 1 events\nthe teacher's tail: 1 - Σ p, or tail_logprob",
    )
    d.arrow(100, 218, 100, 250)
    d.arrow(351, 218, 351, 250)
    d.box(
        0,
        252,
        299,
        44,
        "gradient",
        "the tokens' gradients,\nscattered to their columns",
    )
    d.box(303, 252, 97, 44, "gradient", "one number\nr for the tail")
    d.arrow(351, 298, 351, 318)
    d.box(
        0, 320, 400, 28, "gradient", "every other column v: r e^(z_v/T) / Σ e^(z/T)"
    )
    d.note(370, "One read of the row, K gathers, one write of the gradient.")
    return d


def vocabulary() -> Drawing:
    """Processes that share a vocabulary."""
    d = Drawing()
    d.title(12, "Each process has some columns of every row")
    for rank in range(3):
        x = 136 * rank
        d.box(x, 24, 128, 24, "student", f"process {rank}: V/R")
        d.arrow(x + 64, 50, x + 64, 70)
        d.box(x, 72, 128, 24, "numbers", "statistics")
        d.arrow(x + 64, 98, x + 64, 118)
    d.box(0, 120, 400, 26, "box", "all-gather: a dozen numbers a row")
    for rank in range(3):
        x = 136 * rank
        d.arrow(x + 64, 148, x + 64, 168)
        d.box(x, 170, 128, 40, "numbers", "all statistics,\nin rank order")
        d.arrow(x + 64, 212, x + 64, 232)
    d.box(
        0,
        234,
        400,
        42,
        "box",
        "only without a closed form:\nall-gather of Σ φ and Σ g",
        True,
    )
    for rank in range(3):
        x = 136 * rank
        d.arrow(x + 64, 278, x + 64, 298)
        d.box(
            x, 300, 128, 40, "gradient", "loss: same bits;\ngradient: own columns"
        )
    d.note(362, "No exchanged tensor has the size of the vocabulary.")
    return d


DRAWINGS: tuple[Callable[[], Drawing], ...] = (
    gains,
    statistics,
    sweeps,
    chunks,
    split,
    cluster,
    topk,
    vocabulary,
)


def main() -> None:
    """Write all drawings."""
    FOLDER.mkdir(exist_ok=True)
    for draw in DRAWINGS:
        (FOLDER / f"{draw.__name__}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
