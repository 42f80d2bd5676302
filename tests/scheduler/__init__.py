"""Tests of the scheduler's side."""
