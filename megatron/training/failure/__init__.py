"""When one rank fails, all stop: at once, with a message that names it and what each was waiting for.

`watch` runs beside every rank's main thread, `hub` on rank 0 hears of every death and complaint, `verdict` decides
who is to blame, `state` says what a rank is doing.
"""

from __future__ import annotations
