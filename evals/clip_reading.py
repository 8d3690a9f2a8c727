"""What a video file is, how fast its frames are read, and how much memory that takes; for `vlprune.evals.clips`."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from pathlib import Path
from typing import Any

from vlprune.errors import VlpruneError
from vlprune.evals.asking import Frames, open_sample
from vlprune.evals.benchmark import Sample
from vlprune.video import Clip

READS = 3
_before = 0                                                              # bytes of the process when a peak was begun


def facts(file: Path) -> dict[str, Any]:
    """What the file is, as far as it can be opened."""
    from vlprune.video_index import open_stream

    found: dict[str, Any] = {"bytes": file.stat().st_size}
    try:
        container, stream = open_stream(file)
        with container:
            found |= {
                "codec": stream.codec_context.codec.canonical_name, "container": container.format.name, "width": stream.codec_context.width,
                "height": stream.codec_context.height, "sound": len(container.streams.audio) > 0,
            }  # fmt: skip
    except Exception:                                                     # what is wrong is said when it is read
        pass
    return found


def read(file: Path, frames: Frames) -> dict[str, Any]:
    """Read the frames a few times; or the error."""
    sample, seconds, worked, peaks = Sample("clip", "", (), video=file), [], [], []
    clip: Clip | None = None
    for _ in range(READS):
        clip = None                                                      # the frames of before are no part of the next peak
        start_peak()
        begun, busy = time.perf_counter(), time.process_time()
        try:
            clip = open_sample(sample, frames).clip
        except VlpruneError as error:
            return {"error": " ".join(str(error).split())[:400]}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
        seconds.append(time.perf_counter() - begun)
        worked.append(time.process_time() - busy)                        # by this process alone, however busy the machine is
        peaks.append(peak())
    assert clip is not None
    known = [value for value in peaks if value is not None]
    return {
        "frames": clip.num_frames, "fps": round(clip.fps, 3), "duration": round(clip.duration, 3), "exact": clip.exact, "taken": len(clip.frames),
        "backend": clip.backend, "note": clip.note, "read_ms": 1e3 * statistics.median(seconds), "read_cpu_ms": 1e3 * statistics.median(worked),
        "per_second": len(clip.frames) / statistics.median(seconds), "read_peak_bytes": int(statistics.median(known)) if known else None,
    }  # fmt: skip


def start_peak() -> None:
    """Forget the most memory that the process has had, where the kernel lets us (Linux)."""
    global _before
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):                    # what was freed is to be asked for again, not taken from a store (glibc)
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        _before = _status("VmRSS")
    except OSError:
        _before = 0


def peak() -> int | None:
    """Bytes that the process had at most since `start_peak`, above what it had then; ``None`` where that is not known."""
    return max(_status("VmHWM") - _before, 0) if _before else None


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
