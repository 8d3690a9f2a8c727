"""Ask about a video file: read frames with decord, prune, answer, draw what stayed in each frame.

python examples/video_question.py                                 # a small video, made on the spot, and the embedded model
python examples/video_question.py VIDEO "your question" MODEL     # any supported Hugging Face model
"""

import sys

import vlprune
from vlprune.draw import draw_kept
from vlprune.evals import digits
from vlprune.loading import load_embedded, load_model
from vlprune.video import read_video, write_video

if len(sys.argv) > 3:
    path, question, loaded = sys.argv[1], sys.argv[2], load_model(sys.argv[3])
else:
    scenes = [digits.scene("heldout", number).pil() for number in range(4)]
    path = write_video("out/video_question.avi", [scene for scene in scenes for _ in range(4)], fps=8)
    question, loaded = "how many digits are there ?", load_embedded()
    print(*loaded.notes, sep="\n", end="")

clip = read_video(path, num_frames=4)
print(f"{clip.path.name}: {clip.num_frames} frames; read {clip.indices} at {clip.captions}")

if loaded.embedded:                                     # it knows single pictures: each frame is asked by itself, in one batch
    inputs = loaded.batch(question, clip.frames)
else:                                                   # a video where the model takes one, else several images in one prompt
    inputs = loaded.inputs(question, clip.frames, video=loaded.takes_video, clip=clip)

with vlprune.apply(loaded.model, "hiprune", keep=0.25) as handle:
    for number, answer in enumerate(loaded.answers(inputs, max_new_tokens=4)):
        print(f"answer {number + 1}: {answer}")
    report = handle.report()
print(report)

items = list(range(len(report.points[-1].items)))       # one item a frame, or one for the whole video
frames = [loaded.seen(frame, inputs) for frame in clip.frames]
draw_kept(frames, report, items if len(items) > 1 else 0, captions=clip.captions, save="out/video_question.png")
print("what stayed: out/video_question.png")
