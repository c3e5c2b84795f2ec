"""The facts of `recall`, in a text of about 4,000 tokens."""

from __future__ import annotations

from vtok.eval.tasks import recall

TASK = recall.task("recall_4k", "Facts in a text of 4,000 tokens", 360)
