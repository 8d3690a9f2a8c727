"""Compare all methods on held-out questions: right answers, tokens, cache.

python examples/compare_methods.py [NUMBER_OF_QUESTIONS] [KEEP]
"""

import sys

from rich.console import Console
from rich.table import Table

import vlprune
from vlprune.evals import digits
from vlprune.loading import load_embedded

number = int(sys.argv[1]) if len(sys.argv) > 1 else 24
keep = float(sys.argv[2]) if len(sys.argv) > 2 else 0.25
loaded = load_embedded()
print(*loaded.notes, sep="\n", end="")
asked = [(loaded.inputs(question.text, [scene.pil()]), question.answer) for scene, question in digits.heldout_questions(number, seed=1)]

table = Table("method", "right", "visual tokens at each point", "KV cache", title=f"{number} held-out questions, keep={keep}")
for name in vlprune.list_methods():
    if vlprune.get_method(name).modality == "video":
        continue
    try:
        handle = vlprune.apply(loaded.model, name, keep=keep)
    except vlprune.VlpruneError as reason:              # such as a method for vision towers that this model cannot have cut
        table.add_row(name, "-", f"[dim]{reason}[/]", "-")
        continue
    with handle:
        right = sum(loaded.answers(inputs, max_new_tokens=4) == [answer] for inputs, answer in asked)
        report = handle.report()                        # of the last question
    points = ", ".join(f"{point.point} {point.visual_before} -> {point.visual_kept}" for point in report.points) or "all stay"
    cache = f"{report.kv_bytes_pruned / report.kv_bytes_dense:.0%}" if report.kv_bytes_dense else "-"
    table.add_row(name, f"{right} of {number}", points, cache)
Console(width=120).print(table)
