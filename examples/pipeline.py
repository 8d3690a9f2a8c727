"""A Hugging Face pipeline with a pruned model: `apply` changes the model that the pipeline already holds, so nothing else changes.

python examples/pipeline.py                                       # the embedded model on a picture it never saw
python examples/pipeline.py MODEL PICTURE "your question"         # any supported Hugging Face model
"""

import sys

from PIL import Image
from transformers import pipeline

import vlprune
from vlprune.evals import digits
from vlprune.loading import load_embedded, load_model

if len(sys.argv) > 3:
    loaded, picture, question = load_model(sys.argv[1]), Image.open(sys.argv[2]).convert("RGB"), sys.argv[3]
else:
    loaded, picture, question = load_embedded(), digits.scene("heldout", 7).pil(), "how many digits are there ?"
    print(*loaded.notes, sep="\n", end="")

ask = pipeline("image-text-to-text", model=loaded.model, processor=loaded.processor, device=loaded.model.device)
prompt = loaded.prompt(question)                        # the model's chat template; a pipeline takes messages as well
words = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 32, "do_sample": False}}

print("dense: ", ask(images=picture, text=prompt, **words)[0]["generated_text"].strip())

handle = vlprune.apply(ask.model, "hiprune", keep=0.25)
print("pruned:", ask(images=picture, text=prompt, **words)[0]["generated_text"].strip())
for point in handle.report().points:
    print(f"{point.point}: {point.visual_kept} of {point.visual_before} visual tokens kept")

handle.remove()                                         # the pipeline's model is exactly what it was
print("again: ", ask(images=picture, text=prompt, **words)[0]["generated_text"].strip())
