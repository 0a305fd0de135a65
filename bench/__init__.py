"""Benchmarks: installed as `peft_fast.bench`, run as `python bench/x.py` or `python -m peft_fast.bench.x`.

`registry` lists the cases, `providers` who computes them, `suite` times them (`peft-fast bench`).
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read when torch loads: its profiler announces each start
