"""Zero-shot classification with CLIP whose vision tower drops patches half-way.

python examples/clip_zero_shot.py                                 # a tiny random CLIP: shows the mechanics, not accuracy
python examples/clip_zero_shot.py MODEL PICTURE "a cat" "a dog"   # any CLIP of transformers
"""

import sys

import torch
from PIL import Image
from transformers import AutoProcessor, CLIPConfig, CLIPModel

import vlprune

if len(sys.argv) > 3:
    labels = sys.argv[3:]
    model, processor = CLIPModel.from_pretrained(sys.argv[1]).eval(), AutoProcessor.from_pretrained(sys.argv[1])
    inputs = processor(text=labels, images=Image.open(sys.argv[2]).convert("RGB"), return_tensors="pt", padding=True)
else:
    labels, widths = ["a", "b", "c"], {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    text = {**widths, "vocab_size": 100, "bos_token_id": 98, "eos_token_id": 99}
    config = CLIPConfig(text_config=text, vision_config={**widths, "image_size": 64, "patch_size": 8})
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    inputs = {"input_ids": torch.tensor([[98, 5, 99], [98, 6, 99], [98, 7, 99]]), "pixel_values": torch.randn(1, 3, 64, 64)}


def probabilities() -> dict[str, float]:
    """Label probabilities of the picture."""
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    return {label: round(value, 3) for label, value in zip(labels, logits.softmax(dim=-1)[0].tolist(), strict=True)}


half_way = model.config.vision_config.num_hidden_layers // 2
print("dense: ", probabilities())
with vlprune.apply(model, "uniform", keep=0.5, point=f"vision:{half_way}") as handle:    # CLS always stays
    print("pruned:", probabilities())
    print(handle.report())
