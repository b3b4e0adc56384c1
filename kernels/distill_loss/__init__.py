"""Losses of a student's output head, against a teacher's or labels, logits never all in memory."""
