"""Tests of an agent and its workers."""
