"""Frozen vision models whose geometry the student is aligned to."""

from __future__ import annotations

from kuea_mllm.teachers.load import load_teacher
from kuea_mllm.teachers.teacher import Teacher, resize_pixels

__all__ = ["Teacher", "load_teacher", "resize_pixels"]
