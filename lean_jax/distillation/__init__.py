"""Distillation: losses between a student and a teacher, and how a student starts."""
