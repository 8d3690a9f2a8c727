"""Prune a model with one line, ask it something, see what changed, undo it.

python examples/quickstart.py                                     # the embedded model on a picture it never saw
python examples/quickstart.py MODEL PICTURE "your question"       # any supported Hugging Face model
"""

import sys

from PIL import Image

import vlprune
from vlprune.draw import draw_kept
from vlprune.evals import digits
from vlprune.loading import load_embedded, load_model

if len(sys.argv) > 3:
    loaded, picture, question = load_model(sys.argv[1]), Image.open(sys.argv[2]).convert("RGB"), sys.argv[3]
else:
    loaded, picture, question = load_embedded(), digits.scene("heldout", 7).pil(), "how many digits are there ?"
    print(*loaded.notes, sep="\n", end="")

model = loaded.model                                    # a plain transformers model
inputs = loaded.inputs(question, [picture])             # what its processor makes of the question and the picture

print("dense: ", loaded.answers(inputs, max_new_tokens=4)[0])
handle = vlprune.apply(model, "hiprune", keep=0.25)     # a quarter of the visual tokens stays
print("pruned:", loaded.answers(inputs, max_new_tokens=4)[0])

report = handle.report()
print(report)
for point in report.points:
    print(f"{point.point}: {point.visual_before} visual tokens before, {point.visual_kept} after")
draw_kept(loaded.seen(picture, inputs), report, original=True, save="out/quickstart.png")
print("what stayed: out/quickstart.png")

handle.remove()                                         # the model is exactly what it was
