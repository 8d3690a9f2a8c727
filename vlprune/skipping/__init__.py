"""Skipping: tokens, modules and layers that do not run, for text and while decoding.

Some methods want to know something of a model beforehand. ``CALIBRATIONS`` says which function measures it; all have the same form, and
`vlprune.skipping.calibrate.calibrate` and ``vlprune calibrate`` call them:

    calibrate(model, inputs, out, *, progress=None, resume=True, **options) -> Path

``inputs`` are calls of the model with ``input_ids`` (a list or any iterable), ``out`` the folder to write to, ``progress(done, total, what)`` is told how
far it is, and with ``resume`` a stopped run goes on from what is in the folder. The path returned is what the method's option takes; a constant ``OPTION``
beside the function names that option.
"""

#: Name of a method to ``"module:function"``.
CALIBRATIONS: dict[str, str] = {
    "fasa": "vlprune.skipping.frequency_chunks:calibrate",
    "ffn_skip": "vlprune.skipping.saturation:calibrate",
    "modes": "vlprune.skipping.expert_importance:calibrate",
    "spts": "vlprune.skipping.ffn_probe:calibrate",
    "token_sparse_attention": "vlprune.skipping.drift:calibrate",
}
