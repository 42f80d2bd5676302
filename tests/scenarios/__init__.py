"""Tests of whole situations: faults, load, random demand."""
