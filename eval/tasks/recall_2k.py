"""The facts of `recall`, in a text of about 2,000 tokens."""

from __future__ import annotations

from vtok.eval.tasks import recall

TASK = recall.task("recall_2k", "Facts in a text of 2,000 tokens", 178)
